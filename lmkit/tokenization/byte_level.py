"""Byte-level BPE: its split expressions, its byte table, and its exact twin in tiktoken for encoding corpora fast.

`make_encoder` turns plain text into ids several times faster than `tokenizers` where a tokenizer is a byte-level BPE,
with the same ids (`fast_is_exact` checks), and leaves everything else to `tokenizers`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# Where a text is cut into words before merges are counted or applied; each as the model of that name publishes it.
_COMMON = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _COMMON,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _COMMON,
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
}
MAX_RUN = 512  # characters of one class in a row: merging takes time quadratic in the length of a word
_CLASSES = r"[^\W_]{{{0}}}|\s{{{0}}}|(?:(?![^\W_])\S){{{0}}}"  # letters and digits, spaces, the rest
_LONG_RUN = re.compile(_CLASSES.format(MAX_RUN))
# All the stretches from a place on that are broken: of two neighbours a long run covers one whole.
_STRETCH = MAX_RUN // 2
_BROKEN_STRETCHES = re.compile(rf"(?s:(?!{_CLASSES.format(_STRETCH)}).{{{_STRETCH}}})*+")

# byte -> the printable character that stands for it in a byte-level vocabulary (GPT-2's table)
_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_CHARACTERS = [chr(byte) if byte in _PRINTABLE else chr(256 + _HIDDEN.index(byte)) for byte in range(256)]
_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for.

    >>> token_bytes("\u0120the")
    b' the'
    """
    return bytes(_BYTES[character] for character in token)


def capped(split: str) -> str:
    """The expression with every run cut after 512 characters; equal to `split` where there is no longer one.

    tiktoken's engine cannot compile it, so texts with such runs are left to `tokenizers`.

    >>> capped(r" ?\\p{L}++[\\r\\n]*")
    ' ?\\\\p{L}{1,512}[\\\\r\\\\n]{0,512}'
    """
    greedy = split.replace("++", "+").replace("?+", "?")  # possessive ones match the same here
    return greedy.replace("+", f"{{1,{MAX_RUN}}}").replace("*", f"{{0,{MAX_RUN}}}")


def has_long_run(text: str) -> bool:
    """Whether `capped` may cut a word of `text`; never False where it does.

    >>> has_long_run("a" * 600), has_long_run("a word " * 600)
    (True, False)
    """
    at = 0
    while len(text) - (at := _BROKEN_STRETCHES.match(text, at).end()) >= _STRETCH:
        # A long run over this stretch does not reach back over the one before it.
        if _LONG_RUN.search(text, max(at - _STRETCH, 0), at + MAX_RUN):
            return True
        at += _STRETCH
    return False


def byte_level_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], split: str, nfc: bool) -> Tokenizer:
    """A byte-level BPE: text cut into words by the expression `split`, capped, then bytes merged."""
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(capped(split)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


Encoder = Callable[[list[str]], list[list[int]]]


def make_encoder(tokenizer_json: str, fast: bool) -> Encoder:
    """A function from texts to their ids, as plain text: the name of a special token in them is spelled out.

    tokenizer_json: the content of a tokenizer.json. fast: use tiktoken where it can express the tokenizer.
    """
    spec = json.loads(tokenizer_json)
    backend = Tokenizer.from_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def encode_exactly(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    twin = _tiktoken_twin(spec) if fast else None
    if twin is None:
        return encode_exactly
    names = [token["content"] for token in spec["added_tokens"] if not token["special"]]

    def encode_one(text: str) -> list[int]:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if has_long_run(text) or (names and any(name in text for name in names)):
            return encode_exactly([text])[0]
        return twin.encode_ordinary(text)  # `encode` and `encode_to_numpy` look for special tokens: half the speed

    return lambda texts: [encode_one(text) for text in texts]


def fast_is_exact(tokenizer_json: str, sample: Sequence[str]) -> bool:
    """Whether the fast encoder gives the ids of `tokenizers`, on `sample` and on every token repeated; warns if not."""
    backend = Tokenizer.from_str(tokenizer_json)
    # Tokens that repeat are where two orders of merging could part.
    repeated = [token * 3 for token in backend.decode_batch([[i] for i in range(backend.get_vocab_size())])]
    fast, exact = (make_encoder(tokenizer_json, fast)([*sample, *repeated]) for fast in (True, False))
    if not (same := fast == exact):
        warnings.warn("tiktoken gives other ids than this tokenizer; encoding with the slower one.", stacklevel=2)
    return same


def _tiktoken_twin(spec: dict) -> tiktoken.Encoding | None:
    """The same merges in tiktoken, or None where the tokenizer is not a byte-level BPE that tiktoken can express."""
    model, split = spec["model"], _split_expression(spec["pre_tokenizer"])
    plain = not any(model.get(k) for k in ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix"))
    if split is None or model["type"] != "BPE" or not plain or model.get("end_of_word_suffix"):
        return None
    added = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    merged = [vocab.get(left + right, -1) for left, right in model["merges"]]
    if not set(BYTE_CHARACTERS) <= set(vocab) or not set("".join(vocab)) <= set(_BYTES):
        return None
    # tiktoken merges by id, so ids must rise with the order of the merges, and each token come from one merge.
    if any(a >= b for a, b in zip([-1, *merged], merged)) or len(vocab) != 256 + len(merged):
        return None
    ranks = {token_bytes(token): i for token, i in vocab.items()}
    return tiktoken.Encoding(name="twin", pat_str=split, mergeable_ranks=ranks, special_tokens={})


def _split_expression(pre_tokenizer: dict | None) -> str | None:
    """The expression by which a byte-level pre-tokenizer cuts words, not capped; None for any other pre-tokenizer."""
    *splits, last = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return None if splits else SPLITS["gpt2"]
    if len(splits) != 1 or splits[0].get("behavior") != "Isolated" or splits[0]["invert"]:
        return None
    expression = splits[0]["pattern"].get("Regex")
    return {capped(split): split for split in SPLITS.values()}.get(expression, expression)
