"""Talking to the models of a run: streaming, several models side by side, from a terminal or from a pipe.

    lmkit chat runs/tiny --compare sft,ppo

At a terminal the turns of a conversation build on each other. From a pipe every line is a question of its own and gets
one line of output, line breaks in it written as \\n; notes go to stderr, so that the output holds answers alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.generation.sampler import draw, reserved_cache
from lmkit.model_files import check_model_files
from lmkit.tokenization.chat import encode_text, render, stop_token_ids
from lmkit.tokenization.read import read_tokenizer
from lmkit.tracking import printable

COLUMN_WIDTH = 48  # below this, answers are shown one after another instead of side by side
HELP = """/seed N     seed of the next answer (it then counts up by one an answer)
/temp X     temperature; 0 takes the most likely token each time
/save FILE  write what was said so far, one JSON line an answer
/new        forget the conversation
/quit       leave (as does Ctrl-D); Ctrl-C stops an answer"""

# ----------------------------------------------------------------------------------------------------------- models


@dataclass
class Voice:
    """A model that talks. continues: it goes on with a text (a base model) instead of answering a message."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    continues: bool
    history: list[dict[str, str]] = field(default_factory=list)


def load_voice(name: str, path: Path) -> Voice:
    """The model and tokenizer of a folder, on the GPU when there is one; BadInput when it is not a language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_files(path)
    kinds = AutoConfig.from_pretrained(path, local_files_only=True).architectures or []
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        found = ", ".join(kinds) or "a model of no stated kind"
        raise BadInput(f"{path} holds {found}, which does not write text. Give one trained on objective next_token.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).to(device).eval()
    tokenizer = read_tokenizer(path)
    # A base model carries the chat template for the stages after it, but has never seen a conversation.
    return Voice(name, model, tokenizer, continues=name == "pretrain" or not tokenizer.chat_template)


# --------------------------------------------------------------------------------------------------------- streaming


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_token_ids: list[int],
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Token ids of one completion as they are drawn, the stop token left out; the same ids `sample` draws."""
    uniforms = torch.rand(1, max_new_tokens, generator=generator).to(model.device)
    cache = reserved_cache(model, len(prompt_ids) + max_new_tokens)
    ids = torch.tensor([prompt_ids], device=model.device)
    for step in range(max_new_tokens):
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        drawn, _ = draw(outputs.logits[:, -1], uniforms[:, step], temperature, 0, 1.0)
        if drawn.item() in stop_token_ids:
            return
        yield drawn.item()
        ids = drawn[:, None]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """Text of a stream of ids, cut where no later id can change what was given: a character may span several ids."""
    seen: list[int] = []
    start = read = 0  # ids before `start` need no second look; those before `read` are given already
    given = ""
    for new in ids:
        seen.append(new)
        text = tokenizer.decode(seen[start:], skip_special_tokens=True)
        if len(text) > len(given) and not text.endswith("\ufffd"):
            yield text[len(given) :]
            start, read = read, len(seen)
            given = tokenizer.decode(seen[start:read], skip_special_tokens=True)
    if rest := tokenizer.decode(seen[start:], skip_special_tokens=True)[len(given) :]:
        yield rest


# ------------------------------------------------------------------------------------------------------ conversation


@dataclass
class Chat:
    """Voices, what was said, and how the next answer is drawn.

    rows: one per answer with model, prompt, completion, seed and temperature, as /save writes them.
    """

    voices: list[Voice]
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    rows: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, line: str) -> dict[str, Iterator[str]]:
        """Name -> the answer, piece by piece as it is drawn; each call draws with the next seed.

        An iterator that is closed early keeps what it has given as the answer. Raises BadInput when `line` leaves a
        model no room to answer.
        """
        answers = {voice.name: self._answer(voice, line, *self._prompt(voice, line)) for voice in self.voices}
        self.seed += 1
        return answers

    def _prompt(self, voice: Voice, line: str) -> tuple[list[int], int, int]:
        """Prompt ids, how many tokens the answer may have, its seed. The oldest turns go when there is no room."""
        room = getattr(voice.model.config, "max_position_embeddings", None) or sys.maxsize
        while True:
            messages = [*voice.history, {"role": "user", "content": line}]
            ids = encode_text(voice.tokenizer, line) if voice.continues else render(voice.tokenizer, messages)[0]
            if len(ids) + self.max_new_tokens <= room or not voice.history:
                break
            del voice.history[:2]
        if len(ids) >= room or not ids:
            raise BadInput(f"{voice.name}: the text has {len(ids)} tokens; wanted 1 to {room - 1}. Ask something else.")
        return ids, min(self.max_new_tokens, room - len(ids)), self.seed

    def _answer(self, voice: Voice, line: str, prompt_ids: list[int], limit: int, seed: int) -> Iterator[str]:
        ids = stream(
            voice.model,
            prompt_ids,
            max_new_tokens=limit,
            stop_token_ids=stop_token_ids(voice.tokenizer),
            temperature=self.temperature,
            generator=torch.Generator().manual_seed(seed),
        )
        said: list[str] = []
        try:
            for piece in pieces(voice.tokenizer, ids):
                said.append(piece)
                yield printable(piece)
        finally:
            prompt = line if voice.continues or not voice.history else [*voice.history, _user(line)]
            row = {"model": voice.name, "prompt": prompt, "completion": "".join(said)}
            self.rows.append({**row, "seed": seed, "temperature": self.temperature})
            voice.history += [_user(line), {"role": "assistant", "content": "".join(said)}]

    def forget(self) -> None:
        for voice in self.voices:
            voice.history.clear()

    def command(self, line: str) -> str:
        """Obeys a line that starts with / and returns what to tell; EOFError for /quit, BadInput when it is unknown."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/seed":
                self.seed = _number(int, value, "a whole number, as in /seed 3")
                return f"seed {self.seed}"
            case "/temp":
                self.temperature = _number(float, value, "a number from 0 up, as in /temp 0.7")
                return f"temperature {self.temperature}"
            case "/save":
                return self._save(value)
            case "/new":
                self.forget()
                return "a new conversation"
            case "/help":
                return HELP
            case "/quit":
                raise EOFError
        raise BadInput(f"{name} is not a command. Commands: /seed /temp /save /new /help /quit.")

    def _save(self, value: str) -> str:
        if not value or Path(value).exists():
            raise BadInput(f"{value or 'no file'}: wanted the name of a new file, as in /save chat.jsonl.")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        try:
            Path(value).write_text(text, encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{value} cannot be written: {error.strerror}. Choose another place.") from None
        return f"{len(self.rows)} answers written to {value}"


def _user(line: str) -> dict[str, str]:
    return {"role": "user", "content": line}


def _number(kind: type, value: str, wanted: str) -> Any:
    with contextlib.suppress(ValueError):
        if (number := kind(value)) >= 0 and number < 2**63:
            return number
    raise BadInput(f"{value or 'nothing'} was given; wanted {wanted}.")


# ---------------------------------------------------------------------------------------------------------- terminal


def talk(chat: Chat) -> None:
    """Reads stdin until its end or /quit and answers each line."""
    if sys.stdin.isatty():
        _converse(chat)
    else:
        _answer_lines(chat)


def _answer_lines(chat: Chat) -> None:
    """A pipe: one line of output a question and voice, the voice's name and a tab in front when there are several."""
    for line in map(str.strip, sys.stdin):
        if line.startswith("/"):
            try:
                print(chat.command(line), file=sys.stderr)
            except EOFError:
                return
        elif line:
            for name, answer in chat.ask(line).items():
                text = "".join(answer).replace("\n", "\\n")
                print(f"{name}\t{text}" if len(chat.voices) > 1 else text, flush=True)
            chat.forget()


def _converse(chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and its editing keys
    for voice in chat.voices:
        what = "continues a text" if voice.continues else "answers"
        print(f"{voice.name}: {voice.model.num_parameters() / 1e6:.2f} M parameters on {voice.model.device}, {what}")
    print("/help lists the commands")
    while True:
        try:
            line = input("\n> ").strip()
            if line.startswith("/"):
                print(chat.command(line))
            elif line:
                _show(chat.ask(line))
        except BadInput as error:
            print(error)
        except KeyboardInterrupt:
            print("\n(stopped; /quit leaves)")
        except EOFError:
            print()
            return


def _show(answers: dict[str, Iterator[str]]) -> None:
    """Streams answers: in columns when they fit, else one after another."""
    with contextlib.ExitStack() as stack:
        for answer in answers.values():
            stack.callback(answer.close)
        if (
            len(answers) > 1
            and sys.stdout.isatty()
            and shutil.get_terminal_size().columns >= COLUMN_WIDTH * len(answers)
        ):
            _show_columns(answers)
            return
        for name, answer in answers.items():
            print(f"{name}: " if len(answers) > 1 else "", end="")
            for piece in answer:
                print(piece, end="", flush=True)
            print()


def _show_columns(answers: dict[str, Iterator[str]]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = dict.fromkeys(answers, "")

    def table() -> Table:
        columns = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for name in texts:
            columns.add_column(name, ratio=1)
        columns.add_row(*map(Text, texts.values()))
        return columns

    console = Console()
    try:
        # What is taller than the screen cannot be redrawn: the growing table is cropped, the finished one printed.
        with Live(console=console, transient=True, refresh_per_second=12) as live:
            for step in itertools.zip_longest(*answers.values(), fillvalue=""):
                for name, piece in zip(texts, step):
                    texts[name] += piece
                live.update(table())
    finally:
        console.print(table())
