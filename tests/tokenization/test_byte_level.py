"""tiktoken's ids are the tokenizer's, in every case it takes; the rest is left to tokenizers."""

import json
import random
import sys

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from lmkit.tokenization import byte_level
from lmkit.tokenization.byte_level import BYTE_CHARACTERS, SPLITS, fast_is_exact, has_long_run, make_encoder
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.measure import HOSTILE
from lmkit.tokenization.train import train_tokenizer


def agree(tokenizer, texts):
    encode = make_encoder(tokenizer.backend_tokenizer.to_str(), fast=True)
    return all(np.array_equal(ids, encode_text(tokenizer, text)) for ids, text in zip(encode(texts), texts))


def is_fast(tokenizer):
    return byte_level._tiktoken_twin(json.loads(tokenizer.backend_tokenizer.to_str())) is not None


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("nfc", [False, True])
def test_fast_ids_equal_the_tokenizers(split, nfc, documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=512, split=split, nfc=nfc, allow_smaller_vocab=True)
    assert is_fast(tokenizer)
    draw = random.Random(0)
    alphabet = "ab 'sS\n\t\r.,_-09\u00e9e\u0301\u65e5\u0645\U0001f642\u017f\u00a0\u3000\u2028"
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(1500)]
    assert agree(tokenizer, [*documents, *HOSTILE.values(), *texts])


def test_repeated_characters_are_merged_alike():
    corpus = ["aaaaaaa aaaa aa aaaaaaaaaaaaa", "abab ababab abababab", "==== ======== ======="] * 20
    tokenizer = train_tokenizer(lambda: corpus, vocab_size=384, allow_smaller_vocab=True)
    assert agree(
        tokenizer, ["a" * n for n in range(40)] + ["ab" * n + "a" for n in range(30)] + ["=" * n for n in range(40)]
    )


def test_the_cap_is_saved_with_the_tokenizer(tokenizer):
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x " + "a" * 2000 + "=" * 2000)
    assert max(len(word) for word, _ in words) == 513


def test_words_at_the_cap_are_cut_alike(tokenizer):
    units = ["a", "=", " ", "\n", "\u65e5", "=\n", "_-", " \n", "1", "\u00a0 "]
    texts = [f"x {unit * n} y" for unit in units for n in (127, 128, 255, 256, 257, 511, 512, 513, 1024, 1300)]
    assert agree(tokenizer, texts)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_cap_changes_nothing_but_long_runs(split):
    plain, capped = (pre_tokenizers.Split(Regex(e), "isolated") for e in (split, byte_level.capped(split)))
    draw = random.Random(0)
    units = ["a", "1", " ", "\n", "=", "_-", "\u65e5", " \t", "\r\n", "'s", "x "]
    cut = 0
    for _ in range(400):
        runs = [draw.choice(units) * draw.randrange(1, 600) for _ in range(4)]
        text = "x y. " * draw.randrange(60) + "".join(runs)
        words = [word for word, _ in capped.pre_tokenize_str(text)]
        assert max(map(len, words)) <= 1 + 2 * byte_level.MAX_RUN
        if words != [word for word, _ in plain.pre_tokenize_str(text)]:
            assert has_long_run(text)
            cut += 1
    assert cut > 40


def test_long_runs_are_found_wherever_they_begin():
    found = 0
    for start in range(0, 1100, 7):
        for length in (255, 511, 512, 513):
            for character, other in ("a=", "=a", " x"):
                text = (other + " x= a") * (start // 6) + other * (start % 6) + character * length + other * 40
                assert has_long_run(text) == bool(byte_level._LONG_RUN.search(text)), (start, length, character)
                found += has_long_run(text)
    assert found > 900


def test_other_tokenizers_are_left_to_tokenizers(documents):
    unigram = train_tokenizer(lambda: documents, vocab_size=384, kind="sentencepiece_unigram", allow_smaller_vocab=True)
    assert not is_fast(unigram)
    assert agree(unigram, documents)


def test_gpt2s_own_form_is_fast():
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert byte_level._tiktoken_twin(json.loads(backend.to_str())) is not None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert byte_level._tiktoken_twin(json.loads(backend.to_str())) is None


def test_added_words_that_are_not_special_are_still_cut_out(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = type(tokenizer).from_pretrained(tmp_path)
    other.add_tokens(["tower"])
    assert len(tokenizer) in encode_text(other, "the tower is")
    assert agree(other, ["the tower is", "the river is"])


def test_a_tokenizer_tiktoken_would_encode_otherwise_is_found_out():
    """Merges whose ids do not rise would be applied in another order."""
    vocab = {c: i for i, c in enumerate([*BYTE_CHARACTERS, "bc", "ab", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    backend = byte_level.byte_level_tokenizer(vocab, merges, SPLITS["qwen2"], nfc=False)
    assert byte_level._tiktoken_twin(json.loads(backend.to_str())) is None
    assert fast_is_exact(backend.to_str(), ["abc bc ab"])


def test_a_difference_on_the_sample_is_warned_about(tokenizer, monkeypatch):
    monkeypatch.setitem(SPLITS, "qwen2", SPLITS["gpt2"])
    twin = byte_level._tiktoken_twin

    def other_split(spec):
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"[\s\S]"
        return twin(spec)

    monkeypatch.setattr(byte_level, "_tiktoken_twin", other_split)
    with pytest.warns(UserWarning, match="slower"):
        assert not fast_is_exact(tokenizer.backend_tokenizer.to_str(), ["The lowest tower"])


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_two_engines_cut_every_character_alike(split, documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, split=split)
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    contexts = [f"b{c}b.{c}. {c} \n{c}1{c}'{c}" for c in characters]
    assert agree(tokenizer, ["|".join(contexts[at : at + 256]) for at in range(0, len(contexts), 256)])
