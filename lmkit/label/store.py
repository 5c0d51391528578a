"""Pairs for people to compare, and their answers: one file of pairs, and beside it one file for each annotator.

    pairs.jsonl                  {"prompt": ..., "completions": [..., ...]} a line, or prompt, chosen and rejected
    pairs.answers.anna.jsonl     {"pair": id, "answer": "first", "swapped": true, "seconds": 4.2, "time": ...} a line

A pair is known by a hash of its texts, so an answer can never be counted for another text. Answers name the completion
as it stands in the file of pairs, whichever side it was shown on. Answer files are only ever appended to, and a line is
on the disk before the annotator sees the next pair; taking an answer back is one more line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmkit.data.strict import data_suffix, read_rows
from lmkit.errors import BadInput, Locked

ANSWERS = ("first", "second", "tie", "skip")
UNDO = "undo"


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt; `columns` are the others of its row."""

    id: str
    prompt: Any
    completions: tuple[str, str]
    columns: dict[str, Any]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of rows, each once, in the file's order.

    A row has `prompt`, a text or messages, and `completions`, two texts, or `chosen` and `rejected`. Raises BadInput,
    with file and line, for a row that has not, and for a file without rows.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist. Wanted a file of pairs: rows of prompt and completions (two texts).")
    pairs: dict[str, Pair] = {}
    for where, row in read_rows(path, None):
        given = [row[name] for name in ("chosen", "rejected")] if {"chosen", "rejected"} <= row.keys() else None
        texts = row.get("completions", given)
        if not (isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts)):
            raise BadInput(f"{where}  has no pair of texts; wanted two `completions`, or `chosen` and `rejected`.")
        if not _is_prompt(row.get("prompt")):
            raise BadInput(f"{where}  has no `prompt`; wanted a text, or messages with role and content.")
        content = json.dumps([row["prompt"], *texts])
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        columns = {k: v for k, v in row.items() if k not in ("prompt", "completions", "chosen", "rejected")}
        pairs.setdefault(key, Pair(key, row["prompt"], tuple(texts), columns))
    if not pairs:
        raise BadInput(f"{path} holds no pairs. Wanted rows of prompt and completions (two texts).")
    return list(pairs.values())


def _is_prompt(prompt: Any) -> bool:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(t, dict) and isinstance(t.get(k), str) for t in turns for k in ("role", "content"))


def answers_path(pairs: Path, annotator: str) -> Path:
    """Where an annotator's answers stand; BadInput for a name that could not be part of a file's."""
    if not re.fullmatch(r"\w[\w-]{0,39}", annotator):
        raise BadInput(f"annotator {annotator!r}: wanted up to 40 letters, digits, _ or -. Pass --annotator NAME.")
    return pairs.with_name(f"{_stem(pairs)}.answers.{annotator}.jsonl")


def all_answers(pairs: Path) -> dict[str, dict[str, dict]]:
    """Annotator -> pair id -> answer, of all the files beside `pairs` that hold an answer."""
    prefix = f"{_stem(pairs)}.answers."
    files = sorted(p for p in pairs.parent.glob("*.jsonl") if p.name.startswith(prefix))
    standing = {file.name.removeprefix(prefix).removesuffix(".jsonl"): read_answers(file) for file in files}
    return {annotator: own for annotator, own in standing.items() if own}


def _stem(pairs: Path) -> str:
    suffix = data_suffix(pairs)
    return pairs.name[: pairs.name.rindex(suffix)] if suffix else pairs.name


def read_answers(path: Path) -> dict[str, dict]:
    """Pair id -> the answer that stands. A last line that a crash cut off is left out: nobody was told it was saved."""
    standing: dict[str, dict] = {}
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key, answer = row["pair"], row["answer"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path}:{number}  is no answer. The file was changed by hand; remove the line.") from None
        if answer == UNDO:
            standing.pop(key, None)
        elif answer in ANSWERS:
            standing[key] = row
        else:
            raise BadInput(f"{path}:{number}  holds the answer {answer!r}; known are {', '.join(ANSWERS)}, {UNDO}.")
    return standing


class Answers:
    """One annotator's answers, open for more; Locked while another process has them open.

    standing: pair id -> answer, as `read_answers` gives them.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise Locked(
                f"{path} is open in another `lmkit label`. Use its page, stop it, or pass another --annotator NAME."
            ) from None
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)  # what a crash cut off must not swallow the next
        self._sync(path.parent)
        self.standing = read_answers(path)

    def add(self, pair: str, answer: str, swapped: bool, seconds: float) -> bool:
        """Records an answer, on the disk when this returns; False when another stands already, which is kept."""
        if pair in self.standing:
            return self.standing[pair]["answer"] == answer
        row = {"pair": pair, "answer": answer, "swapped": swapped, "seconds": round(seconds, 2)}
        self.standing[pair] = self._append(row)
        return True

    def undo(self, pair: str) -> None:
        """Takes back the answer of a pair; nothing when there is none."""
        if pair in self.standing:
            self._append({"pair": pair, "answer": UNDO})
            del self.standing[pair]

    @property
    def last(self) -> str | None:
        """The pair answered last, among those whose answer stands."""
        return next(reversed(self.standing), None)

    def close(self) -> None:
        os.close(self._file)

    def _append(self, row: dict) -> dict:
        row |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        line, size = json.dumps(row).encode() + b"\n", os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"only a part of a line could be written to {self.path}")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        return row

    @staticmethod
    def _sync(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the name of a new file is part of the folder
        finally:
            os.close(descriptor)


def is_swapped(annotator: str, pair: str) -> bool:
    """Whether this annotator sees the second completion on the left: a fair coin, the same at every showing."""
    return hashlib.sha256(f"{annotator}\n{pair}".encode()).digest()[0] % 2 == 1


def decided(pairs: list[Pair], answers: dict[str, dict[str, dict]]) -> Iterator[dict[str, Any]]:
    """Rows of prompt, chosen and rejected for the pairs where more annotators prefer one completion than the other.

    num_votes counts the annotators who preferred one of the two, agreement is the share of them on the winner's side.
    Ties and skips count for neither.
    """
    for pair in pairs:
        given = [own[pair.id]["answer"] for own in answers.values() if pair.id in own]
        votes = given.count("first"), given.count("second")
        if votes[0] != votes[1]:
            winner = int(votes[1] > votes[0])
            yield {
                **pair.columns,
                "prompt": pair.prompt,
                "chosen": pair.completions[winner],
                "rejected": pair.completions[1 - winner],
                "num_votes": sum(votes),
                "agreement": votes[winner] / sum(votes),
            }


def export(path: Path, pairs: list[Pair], answers: dict[str, dict[str, dict]]) -> int:
    """Writes the decided pairs as JSONL, a new file that is there whole or not at all; their number."""
    if path.exists():
        raise BadInput(f"{path} exists already. Remove it or choose another name.")
    if not (rows := list(decided(pairs, answers))):
        raise BadInput("No pair is decided yet: annotators must prefer one of its completions. Nothing was written.")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return len(rows)
