"""A corpus encoded by several machines that know nothing of each other: part k of n, each in a folder of its own."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmkit.errors import BadInput

Item = TypeVar("Item")


def parse(part: str) -> tuple[int, int]:
    """(k, n) of a part k/n; BadInput when it is none.

    >>> parse("2/8")
    (2, 8)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise BadInput(f"part {part!r}: wanted k/n with k from 1 to n, such as 2/8 for the second of eight machines.")
    return int(found[1]), int(found[2])


def check_part(part: str | None, tokenizer: Path | None) -> None:
    """BadInput for a part that is none, or one whose ids would not be those of the others."""
    if part and parse(part) and tokenizer is None:
        raise BadInput(
            f"part {part} needs --tokenizer: machines that each learnt one of their own would not have the same ids. "
            "Train it once, on the corpus or some of it, and give it to all of them."
        )


def share(items: Iterator[Item] | Sequence[Item], part: str | None) -> Iterator[Item]:
    """Every n-th of the items, from the k-th; all of them without a part.

    >>> list(share("abcdefgh", "2/3"))
    ['b', 'e', 'h']
    """
    k, n = parse(part) if part else (1, 1)
    return itertools.islice(items, k - 1, None, n)


def check_complete(metas: Sequence[dict[str, Any]]) -> None:
    """BadInput unless the folders with these `meta.json` that are parts are all parts of their wholes, each once."""
    found = Counter(meta["part"] for meta in metas if meta.get("part"))
    wholes = {parse(part)[1] for part in found}
    wanted = {f"{k}/{n}" for n in wholes for k in range(1, n + 1)}
    if missing := sorted(wanted - found.keys()):
        raise BadInput(f"the shards are parts of a corpus, and part {', '.join(missing)} is missing. Give all parts.")
    if twice := [part for part, count in found.items() if count > 1]:
        raise BadInput(f"the shards have part {', '.join(twice)} of a corpus twice. Give each part once.")
