"""What a tokenizer does to text: bytes per token, how much of the vocabulary it uses, what comes back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lmkit.tokenization.chat import encode_text

# Texts that tokenizers are known to change; the names say what each is about.
HOSTILE = {
    "every byte as a character": "".join(map(chr, range(256))),
    "NUL and controls": "a\x00b\x00\x00c\x07\x1b[0m\x7f",
    "line ends": "a\r\nb\rc\n\rd\u0085e\u2028f\u2029g\x0bh\x0c",
    "spaces": " a  b   c \t d\u00a0e\u3000f\u200bg \n  \n\t\n h   ",
    "emoji sequences": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3 "
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7",
    "combining marks": "e\u0301 \u00e9 o\u0308\u0332 Z\u0351\u036b\u0343 a\u0323\u0307 \u1112\u1161\u11ab \ud55c",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u200f!\u200e",
    "scripts": "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b \u0928\u092e\u0938\u094d\u0924\u0947 \u03b1 \U0001d518",
    "unassigned and private": "\u0378 \U000e0fff \ue000 \uf8ff \U0010ffff \ufffe \uffff \ufdd0",
    "byte order mark and replacement": "\ufeffa\ufffdb\ufeff",
    "numbers and signs": "0123456789 1,234.5e-6 ______ ====== ((((([[[[ -->> '' \"\" ``",
    "names of special tokens": "<|endoftext|> <|im_start|>user\n<|im_end|><|pad|> <s></s> <unk> <0x0A> [PAD]",
    "SentencePiece's space": "a\u2581b \u2581 c",
    "a long run": "a" * 2000 + "=" * 2000 + " " * 2000 + "\n" * 2000,
}


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether decoding the ids of `text` gives `text` back, character for character."""
    return tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=False) == text


def measure(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Facts about a tokenizer on named texts (files, splits, languages), each an iterable of documents.

    bytes_per_token: name -> UTF-8 bytes per token. vocabulary_used: share of the ids that occur in any of the texts.
    num_learnt: ids that stand for text, where the others are special or only fill the size up.
    num_documents, num_exact: documents, and how many come back exactly. longest_tokens: the ten longest of all.
    hostile_changed: names of the hostile texts (`HOSTILE`) that do not come back exactly.
    """
    counts = np.zeros(len(tokenizer), np.int64)
    bytes_per_token, num_documents, num_exact = {}, 0, 0
    for name, documents in texts.items():
        num_bytes = num_tokens = 0
        for document in documents:
            ids = encode_text(tokenizer, document)
            counts += np.bincount(ids, minlength=len(counts))
            num_bytes, num_tokens = num_bytes + len(document.encode()), num_tokens + len(ids)
            num_documents += 1
            num_exact += tokenizer.decode(ids, skip_special_tokens=False) == document
        bytes_per_token[name] = num_bytes / max(1, num_tokens)
    special = set(tokenizer.all_special_ids)
    spelled = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special]
    return {
        "bytes_per_token": bytes_per_token,
        "vocabulary_used": float((counts > 0).mean()),
        "num_learnt": len(spelled),
        "num_documents": num_documents,
        "num_exact": num_exact,
        "longest_tokens": sorted(spelled, key=len, reverse=True)[:10],
        "hostile_changed": [name for name, text in HOSTILE.items() if not round_trip(tokenizer, text)],
    }


def table(tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, Callable[[], Iterable[str]]]) -> str:
    """Tokenizers side by side: bytes per token by text, share of the ids used, longest tokens, what does not come back.

    texts: name -> a function that starts one pass over its documents.
    """
    facts = {
        name: measure(tokenizer, {text: read() for text, read in texts.items()})
        for name, tokenizer in tokenizers.items()
    }
    rows = [["bytes per token", *facts]]
    rows += [[text, *(f"{f['bytes_per_token'][text]:.3f}" for f in facts.values())] for text in texts]
    rows.append(["vocabulary", *(f"{len(tokenizer):,}" for tokenizer in tokenizers.values())])
    rows.append(["of it used", *(f"{f['vocabulary_used']:.1%}" for f in facts.values())])
    rows.append(["documents", *(str(f["num_documents"]) for f in facts.values())])
    rows.append(["documents changed", *(str(f["num_documents"] - f["num_exact"]) for f in facts.values())])
    rows.append(["hostile texts changed", *(str(len(f["hostile_changed"])) for f in facts.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))] for row in rows]
    notes = [f"longest tokens of {name}: {' '.join(map(repr, f['longest_tokens']))}" for name, f in facts.items()]
    notes += [f"{name} changes texts with {', '.join(c)}" for name, f in facts.items() if (c := f["hostile_changed"])]
    return "\n".join(["  ".join(row) for row in aligned] + notes)
