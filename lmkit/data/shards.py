"""A corpus as token ids in flat, memory-mapped files: written once, by many processes, in any size.

A split is a folder: `tokens.bin` (uint16 up to 65,536 ids, else uint32), `documents.bin` (int64, where each document
starts, and the total), `meta.json` (counts, and the sha256 of the tokenizer). Every document ends with the
end-of-text token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmkit.errors import BadInput, CorruptInput
from lmkit.processes import die_with_parent
from lmkit.tokenization.byte_level import Encoder, fast_is_exact, make_encoder

if TYPE_CHECKING:  # the worker processes start without it
    from transformers import PreTrainedTokenizerBase

BATCH_BYTES = 1 << 20
BATCHES_ALONE = 4  # a smaller corpus is encoded before other processes have started


@dataclass(frozen=True)
class Shards:
    """One split of an encoded corpus, memory-mapped.

    tokens: ids [num_tokens], read-only. document_offsets: int64 [num_documents + 1]; document i is
    `tokens[document_offsets[i]:document_offsets[i + 1]]`, its end-of-text token included. num_bytes: UTF-8 bytes of
    the text, which is what bits per byte divides by.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    num_bytes: int
    meta: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Shards:
        """The split in the folder `path`, such as runs/tiny/tokenizer/shards/train; BadInput when there is none."""
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(
                f"{path} holds no token shards (no meta.json). Give the folder of one split, such as "
                "runs/tiny/tokenizer/shards/train, or make it with `python recipes/tokenizer.py`."
            ) from None
        files = {
            "tokens.bin": (meta["dtype"], meta["num_tokens"]),
            "documents.bin": ("int64", meta["num_documents"] + 1),
        }
        for name, (dtype, length) in files.items():
            size, wanted = (path / name).stat().st_size, np.dtype(dtype).itemsize * length
            if size != wanted:
                raise CorruptInput(f"{path / name} has {size} bytes; meta.json promises {wanted}. Encode it again.")
        arrays = [np.memmap(path / name, dtype, "r", shape=(length,)) for name, (dtype, length) in files.items()]
        return cls(*arrays, meta["num_bytes"], meta)

    def first_documents(self, num_tokens: int) -> np.ndarray:
        """Offsets of the whole documents among the first `num_tokens`; of a part of the first one if it is longer."""
        within = self.document_offsets[: np.searchsorted(self.document_offsets, num_tokens, side="right")]
        return np.array(within) if len(within) > 1 else np.array([0, num_tokens])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """BadInput when the ids were not made by this tokenizer."""
        if (found := tokenizer_sha256(tokenizer)) != self.meta["tokenizer_sha256"]:
            raise BadInput(
                f"The token shards were encoded by another tokenizer (sha256 {self.meta['tokenizer_sha256'][:12]}, "
                f"{self.meta['vocab_size']} ids) than {tokenizer.name_or_path or 'the one given'} ({found[:12]}, "
                f"{len(tokenizer)} ids). Encode the corpus with this one "
                "(`python recipes/tokenizer.py --tokenizer DIR`), or give the one the shards were made with."
            )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a text's ids: vocabulary, merges, normaliser, pre-tokenizer and added tokens."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: spec[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def in_validation(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by its own text, so that order and copies do not matter."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def write_shards(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    num_processes: int = 1,
    part: str | None = None,
) -> Shards:
    """Encodes documents into the folder `directory`, each followed by the tokenizer's end-of-text token.

    The ids are the tokenizer's for plain text: the name of a special token in a document is spelled out. The result
    does not depend on `num_processes`, and memory does not depend on the size of the corpus. Blank documents are left
    out; BadInput when nothing is left, or when the tokenizer has no end-of-text token. part: which of several machines'
    documents these are, for the record; see `lmkit.data.parts`.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput(f"The tokenizer {tokenizer.name_or_path} has no eos_token to put between documents. Set one.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    num_tokens, num_documents, num_bytes = 0, 0, 0
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "documents.bin").open("wb") as offsets:
        for ids, lengths, size in _encoded(documents, tokenizer, num_processes):
            tokens.write(ids.astype(dtype).tobytes())
            offsets.write((num_tokens + np.cumsum(lengths) - lengths).astype(np.int64).tobytes())
            num_tokens, num_documents, num_bytes = num_tokens + len(ids), num_documents + len(lengths), num_bytes + size
        offsets.write(np.int64(num_tokens).tobytes())
    if not num_documents:
        raise BadInput("There is no text to encode: every document is empty or blank. Check the paths of the corpus.")
    meta = {
        "dtype": dtype.name,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_bytes": num_bytes,
        "end_of_text_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    } | ({"part": part} if part else {})
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return Shards.open(directory)


Encoded = tuple[np.ndarray, np.ndarray, int]  # ids of a batch, length of each document in it, bytes of its text


def _encoded(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_processes: int) -> Iterator[Encoded]:
    spec, end = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    batches = _batches(documents)
    first = next(batches, [])
    fast = fast_is_exact(spec, [document[:4000] for document in first[:64]])
    encode = make_encoder(spec, fast)
    batches = itertools.chain([first], batches)
    for batch in itertools.islice(batches, BATCHES_ALONE if num_processes > 1 else None):
        yield _encode(batch, encode, end)
    if (following := next(batches, None)) is None:
        return
    # Not forked: the threads of `tokenizers` do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start_worker, (spec, fast, end)) as pool:
        started = pool.submit(int)
        waiting: deque = deque()  # bounded, so that reading does not run ahead of encoding
        for batch in itertools.chain([following], batches):
            if not started.done():
                yield _encode(batch, encode, end)
                continue
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        if not document.strip():
            continue
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker: tuple[Encoder, int]


def _start_worker(spec: str, fast: bool, end: int) -> None:
    global _worker
    die_with_parent()
    _worker = make_encoder(spec, fast), end


def _work(batch: list[str]) -> Encoded:
    return _encode(batch, *_worker)


def _encode(batch: list[str], encode: Encoder, end: int) -> Encoded:
    flat, lengths = [], []
    for ids in encode(batch):
        flat += ids
        flat.append(end)
        lengths.append(len(ids) + 1)
    # Through `array`, which numpy reads as it is: ten times as fast as from a list.
    tokens = np.frombuffer(array("I", flat), np.uint32)
    return tokens, np.array(lengths, np.int64), sum(len(document.encode()) for document in batch)
