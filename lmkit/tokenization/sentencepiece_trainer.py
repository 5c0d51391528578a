"""SentencePiece BPE and Unigram models, trained by `sentencepiece` and written as a tokenizer.json.

Normalisation is the identity and unknown characters fall back to bytes, so that every text comes back exactly. Spaces
stay spaces in the vocabulary (SentencePiece writes them as U+2581, and so cannot tell the two apart).
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lmkit.errors import BadInput
from lmkit.tokenization.byte_level import MAX_RUN

SAMPLE_CHARACTERS = 32_000_000  # SentencePiece holds what it trains on in memory, several times over
NUM_THREADS = 4  # fixed: Unigram's sums, and so its pieces, depend on it
UNKNOWN = "<unk>"
_SYMBOLS = ["\n", "\t"]
# Lines end at the symbols, and at characters that SentencePiece reserves for itself or cannot tell from a space.
_LINE_END = re.compile("[\n\t\r\0\u2581\u2585]")
_MAX_LINE = 1000
# In order: the symbols; the "<" of what looks like a byte piece or a special token, so that no text is one; each word
# with the spaces before it (no piece goes over the end of a word); the cap.
_WORDS = [r"[\n\t]+", r"<(?=0x[0-9A-F]{2}>|unk>|\|[A-Za-z0-9_]+\|>)", r" *[^ ]+| +", rf"[\s\S]{{{MAX_RUN}}}"]


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, kind: str, nfc: bool, max_token_length: int | None, specials: list[str]
) -> Tokenizer:
    """A SentencePiece model trained on up to 32 million characters of `documents`, as a `tokenizers.Tokenizer`.

    The sample is drawn by a hash of each document, so that it does not depend on their order. `kind` is
    "sentencepiece_bpe" or "sentencepiece_unigram"; `max_token_length` None is SentencePiece's own 16 characters. Ids:
    `specials`, <unk>, line end, tab, the 256 bytes, pieces. Raises BadInput when SentencePiece cannot learn so many.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_sample(documents), nfc),
            model_writer=model,
            model_type=kind.removeprefix("sentencepiece_"),
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            control_symbols=specials,
            user_defined_symbols=_SYMBOLS,
            unk_id=len(specials),
            unk_piece=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentencepiece_length=max_token_length or 16,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(
            f"SentencePiece cannot learn {vocab_size} pieces from this corpus ({error}). Change vocab_size as it asks, "
            "or give more text."
        ) from None
    return convert(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), kind, nfc)


def convert(learnt: sentencepiece.SentencePieceProcessor, kind: str, nfc: bool) -> Tokenizer:
    """The same pieces and ids as a `tokenizers.Tokenizer`; it differs only where SentencePiece is not exact."""
    pieces = [learnt.id_to_piece(i) for i in range(len(learnt))]
    normal = [not (learnt.is_control(i) or learnt.is_byte(i) or learnt.is_unknown(i)) for i in range(len(learnt))]
    pieces = [piece.replace("\u2581", " ") if ordinary else piece for piece, ordinary in zip(pieces, normal)]
    unk = learnt.unk_id()
    if kind == "sentencepiece_bpe":
        vocab = {piece: i for i, piece in enumerate(pieces)}
        joinable = {piece for piece, ordinary in zip(pieces, normal) if ordinary and piece not in _SYMBOLS}
        # SentencePiece joins any two neighbours that make a piece, the first piece in the vocabulary first.
        merges = [
            (piece[:at], piece[at:])
            for piece in pieces
            if piece in joinable
            for at in range(1, len(piece))
            if piece[:at] in joinable and piece[at:] in joinable
        ]
        model = models.BPE(vocab=vocab, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    else:
        scored = [(piece, learnt.get_score(i)) for i, piece in enumerate(pieces)]
        model = models.Unigram(scored, unk_id=unk, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(w), "isolated") for w in _WORDS])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _sample(documents: Iterable[str]) -> list[str]:
    """Documents of the lowest hashes, as many as fit, in the order of their hashes."""
    kept: list[tuple[int, str]] = []
    num_characters = 0
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "big"), document))
        num_characters += len(document)
        while num_characters > SAMPLE_CHARACTERS and len(kept) > 1:
            num_characters -= len(heapq.heappop(kept)[1])
    return [document for _, document in sorted(kept)]


def _lines(documents: Iterable[str], nfc: bool) -> Iterator[str]:
    for document in documents:
        text = unicodedata.normalize("NFC", document) if nfc else document
        for line in _LINE_END.split(text):
            yield from (line[at : at + _MAX_LINE] for at in range(0, len(line), _MAX_LINE))
