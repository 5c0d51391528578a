"""Reading a tokenizer directory that others may have made, its chat template included, which is a program."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
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


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The same for a model that is to learn: BadInput unless there is an end of text, and a pad that is another."""
    path = Path(path)
    if not (path / "tokenizer_config.json").is_file():
        raise BadInput(f"{path} has no tokenizer (no tokenizer_config.json). Save it there: tokenizer.save_pretrained.")
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise BadInput(
            f"The tokenizer in {path} has eos_token {tokenizer.eos_token!r} and pad_token {tokenizer.pad_token!r}; "
            "wanted both, and different: a model whose padding is its end would not learn to stop. Add one with "
            "tokenizer.add_special_tokens and save it again."
        )
    return tokenizer


def find_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`read_tokenizer` of a directory, or of a name that this machine's cache of the Hub has; nothing is fetched."""
    if Path(name).is_dir():
        return read_tokenizer(Path(name))
    try:
        return read_tokenizer(Path(snapshot_download(name, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        raise BadInput(
            f"{name} is neither a tokenizer's directory nor in this machine's cache of the Hub. Check the path, or get "
            f"it first with `hf download {name} --include 'tokenizer*'`; nothing is fetched by this command."
        ) from None


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
