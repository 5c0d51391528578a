"""How a tokenizer turns a text into ids, told step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lmkit.errors import BadInput
from lmkit.tokenization.byte_level import BYTE_CHARACTERS, token_bytes
from lmkit.tokenization.classic_bpe import steps


def explain(tokenizer_dir: Path | str, text: str) -> str:
    """The words into which the tokenizer in a directory cuts `text`, the merges of each one on a line, and its ids.

    Before each line stands the number of the merge that led to it. Spaces are shown as open boxes. Raises BadInput when
    there is no tokenizer.json.
    """
    path = Path(tokenizer_dir) / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{path} does not exist. Give a tokenizer's directory, such as runs/tiny/tokenizer/tokenizer.")
    backend, model = Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))["model"]
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)] if backend.pre_tokenizer else [normal]
    lines = []
    for word in words:
        if model["type"] == "BPE":
            lines.append(f"{'word':>8}  {_shown([*word])}")
            merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
            lines += [f"{rank:>8}  {_shown(symbols)}" for rank, symbols in steps([*word], merges)]
        else:
            lines.append(f"{'word':>8}  {_shown([word])}")
        tokens = backend.model.tokenize(word)
        lines.append(f"{'ids':>8}  " + " ".join(f"{_shown([token.value])}={token.id}" for token in tokens))
    if model["type"] != "BPE":
        lines.append(f"A {model['type']} model has no merges: it chooses the pieces of a word together.")
    return "\n".join(lines)


def _shown(tokens: Sequence[str]) -> str:
    """Tokens with gaps between them; byte-level ones as text where their bytes are whole characters."""

    def readable(token: str) -> str:
        if set(token) <= set(BYTE_CHARACTERS):
            token = token_bytes(token).decode("utf-8", errors="backslashreplace")
        return token.replace(" ", "\u2423").replace("\n", "\\n")

    return " ".join(map(readable, tokens))
