"""The worked examples, and equality with tokenizers under the rule of the lowest ids."""

import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lmkit.tokenization import classic_bpe as bpe

CORPUS = {"low": 5, "lower": 2, "newest": 6, "widest": 3}


def test_training_on_the_example_of_the_paper():
    merges = ["".join(pair) for pair in bpe.train(CORPUS, 100)]
    end = ["newest</w>", "low</w>", "wi", "wid", "widest</w>", "lowe", "lower", "lower</w>"]
    assert merges == ["es", "est", "est</w>", "lo", "low", "ne", "new", *end]


def test_training_stops_when_no_pair_occurs_twice():
    assert bpe.train({"ab": 1, "cd": 1}, 10) == []
    assert bpe.train({"ab": 1, "bab": 1}, 10, end="") == [("a", "b")]


def test_tokens_in_use_after_each_merge():
    """From 11 symbols: a merge adds a token, and may leave others without use."""
    merges = bpe.train(CORPUS, 5)
    encoded = [[bpe.encode_by_merges(word, merges[:n]) for word in CORPUS] for n in range(6)]
    assert [len({token for word in words for token in word}) for words in encoded] == [11, 11, 10, 10, 9, 9]


def test_the_rules_for_ties_differ():
    # es, st and t</w> all occur 9 times
    assert bpe.train(CORPUS, 1, ties="first_seen") == [("e", "s")]
    assert bpe.train({"ba": 2, "ab": 2}, 1, end="", ties="first_seen") == [("b", "a")]
    assert bpe.train({"ba": 2, "ab": 2}, 1, end="", ties="lowest_id") == [("a", "b")]


def test_the_example_without_words():
    merges = bpe.train({"abbabyabya": 1}, 2, end="")
    assert bpe.encode_by_merges("abbabyabya", merges[:1], end="") == ["ab", "b", "ab", "y", "ab", "y", "a"]
    assert bpe.encode_by_merges("abbabyabya", merges, end="") == ["ab", "b", "aby", "aby", "a"]


def test_the_example_of_bytes():
    merges = bpe.train({"aaabdaaabac": 1}, 3, end="")
    names = {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    tokens = bpe.encode_by_merges("aaabdaaabac", merges, end="")
    assert [names.get(token) or ord(token) for token in tokens] == [258, 100, 258, 97, 99]


def test_encoding_by_length():
    vocabulary = ["errrr</w>", "tain</w>", "moun", "est</w>", "high", "the</w>", "a</w>"]
    assert bpe.encode_by_length("mountain", vocabulary) == ["moun", "tain</w>"]
    assert bpe.encode_by_length("the", vocabulary) == ["the</w>"]
    assert bpe.encode_by_length("thea", vocabulary) == ["<unk>", "a</w>"]
    assert bpe.encode_by_length("xhigh", vocabulary) == ["<unk>", "high", "<unk>"]


def test_the_end_counts_as_one_symbol():
    assert bpe.encode_by_length("abc", ["abc", "c</w>", "ab"]) == ["abc", "<unk>"]


def test_decoding():
    assert bpe.decode(["moun", "tain</w>", "high", "the</w>"]) == ["mountain</w>", "highthe</w>"]
    merges = bpe.train(CORPUS, 8)
    tokens = [token for word in CORPUS for token in bpe.encode_by_merges(word, merges)]
    assert bpe.decode(tokens) == [word + "</w>" for word in CORPUS]


@pytest.mark.parametrize("seed", range(60))
def test_equal_to_tokenizers_on_random_corpora(seed):
    draw = random.Random(seed)
    words = {"".join(draw.choices("abcd", k=draw.randrange(1, 8))): draw.randrange(1, 9) for _ in range(25)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # "~" is the end of a word, in one character because tokenizers starts from characters
    text = [" ".join([word + "~"] * count) for word, count in words.items()]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=45, min_frequency=2, show_progress=False))
    expected = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = bpe.train(words, len(expected), ties="lowest_id", end="~")
    assert merges == expected
    for word in words:
        assert bpe.encode_by_merges(word, merges, end="~") == tokenizer.encode(word + "~").tokens
