"""rustbpe gives the merges of tokenizers, or says that it may not."""

import itertools
import random

import pytest
from tokenizers import Regex, pre_tokenizers

from lmkit.errors import BadInput
from lmkit.tokenization import rustbpe_trainer, train
from lmkit.tokenization.byte_level import SPLITS, capped
from lmkit.tokenization.rustbpe_trainer import merges_of, train_rustbpe

pytest.importorskip("rustbpe")


def both(documents, **options):
    return [
        train.train_tokenizer(lambda: documents, trainer=trainer, **options).backend_tokenizer.to_str()
        for trainer in ("tokenizers", "rustbpe")
    ]


def random_corpus(seed):
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcde", k=draw.randrange(1, 9))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=12)) for _ in range(60)]


@pytest.mark.parametrize("seed", range(12))
def test_merges_are_equal_on_corpora_full_of_ties(seed):
    first, second = both(random_corpus(seed), vocab_size=384)
    assert first == second


@pytest.mark.parametrize("split", SPLITS)
def test_merges_are_equal_for_each_split(split, documents):
    first, second = both(documents, vocab_size=384, split=split)
    assert first == second


def test_merges_are_equal_with_long_words_and_nfc(documents):
    runs = ["ab" * 900, "=" * 900 + "\n" * 700, " " * 2000]
    lines = "\n".join(["one", "  two", "", "three ", *runs, "'s four", "\tfive", *runs, "\r", "1"])
    corpus = [*documents, "x " + "ab" * 900 + " y", "e\u0301" * 700, "=" * 3000, *[lines] * 3]
    first, second = both(corpus, vocab_size=384, nfc=True)
    assert first == second


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_lines_between_long_runs_are_cut_as_the_whole_text_is(split):
    draw = random.Random(0)
    units = ["a", "one", "=", "'s", " ", "\n", "\r\n", "\t", "12", "\x1c", "\u00a0", "\u2028", "x" * 600, " " * 600]
    words = pre_tokenizers.Split(Regex(capped(split)), "isolated")
    for _ in range(300):
        text = "".join(draw.choices(units, k=30))
        parts = rustbpe_trainer._LINES.split(text)
        cut = [word for part in parts for word, _ in words.pre_tokenize_str(part)]
        assert cut == [word for word, _ in words.pre_tokenize_str(text)]
        assert "".join(parts) == text


def test_a_corpus_that_ends_early_is_left_to_tokenizers(documents):
    first, second = both(documents, vocab_size=8192, allow_smaller_vocab=True)
    assert first == second


def test_pairs_too_rare_are_left_to_tokenizers():
    corpus = random_corpus(0)
    merges = train_rustbpe(lambda: corpus, 256 + 60, SPLITS["qwen2"], nfc=False, min_frequency=2)
    assert merges is not None
    assert train_rustbpe(lambda: corpus, 256 + 60, SPLITS["qwen2"], nfc=False, min_frequency=10**6) is None


def test_two_merges_of_one_token_are_left_to_tokenizers(monkeypatch):
    """tokenizers gives both the same id, rustbpe two."""

    class Twice:
        def train_from_iterator(self, documents, num_tokens, buffer_size, pattern):
            list(documents)

        def get_mergeable_ranks(self):
            return [*((bytes([i]), i) for i in range(256)), (b"aa", 256), (b"aaa", 257), (b"aaa", 258), (b"b ", 259)]

    monkeypatch.setattr("rustbpe.Tokenizer", Twice)
    assert train_rustbpe(lambda: ["b b b "] * 9, 260, r"[\s\S]+", nfc=False, min_frequency=2) is None


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc"])
def test_merges_found_from_tokens_alone_are_those_made(alphabet):
    """Random merges of what a text still holds; runs of one letter are where overlapping pairs meet."""
    draw = random.Random(len(alphabet))
    for _ in range(40):
        texts = [[bytes([byte]) for byte in draw.choices(alphabet, k=40)] for _ in range(6)]
        ranks, made = {bytes([byte]): byte for byte in range(256)}, []
        while len(made) < 12:
            pairs = sorted({pair for text in texts for pair in itertools.pairwise(text) if b"".join(pair) not in ranks})
            if not pairs:
                break
            left, right = draw.choice(pairs)
            made.append((left, right))
            ranks[left + right] = len(ranks)
            for text in texts:
                at = 0
                while at < len(text) - 1:
                    if (text[at], text[at + 1]) == (left, right):
                        text[at : at + 2] = [left + right]
                    at += 1
        assert merges_of(ranks) == made


def test_tokens_that_no_merges_make_are_refused():
    with pytest.raises(ValueError, match="b'aab' does not follow"):
        merges_of({b"a": 0, b"b": 1, b"aab": 2})


def test_what_rustbpe_cannot_do_is_refused(documents):
    with pytest.raises(BadInput, match="max_token_length"):
        train.train_tokenizer(lambda: documents, vocab_size=384, trainer="rustbpe", max_token_length=8)


def test_without_rustbpe_auto_is_tokenizers(documents, monkeypatch):
    expected = both(documents, vocab_size=384)[0]
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    options = {"vocab_size": 384}
    assert train.train_tokenizer(lambda: documents, **options).backend_tokenizer.to_str() == expected
    with pytest.raises(BadInput, match="not installed"):
        train.train_tokenizer(lambda: documents, trainer="rustbpe", **options)
