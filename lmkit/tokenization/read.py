"""Reading a tokenizer directory that others may have made, its chat template included, which is a program."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.model_files import check_model_files
from lmkit.tokenization.chat import CHAT_TEMPLATE

MAX_CPU_SECONDS = 2
MAX_BYTES = 1 << 30
MAX_TEXT = 1 << 20
_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory; BadInput when it would run code, or its chat template does not come to an end."""
    check_model_files(path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template and tokenizer.chat_template != CHAT_TEMPLATE:
        _check_template(tokenizer, path)
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Jinja's sandbox keeps a template from files and functions, not from loops: it is tried out in a child process."""
    if (child := os.fork()) == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5 * MAX_CPU_SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
            text = tokenizer.apply_chat_template(_CONVERSATION, tokenize=False)
            os._exit(len(text) > MAX_TEXT)
        except (MemoryError, RecursionError, OverflowError):
            os._exit(1)
        except Exception:
            os._exit(0)  # what a template refuses is told when it is used
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise BadInput(
            f"the chat template of {path} takes more than {MAX_CPU_SECONDS} seconds, a gigabyte, or a megabyte of text "
            "for a conversation of two words. Remove it, or take the template of a model you trust."
        )
