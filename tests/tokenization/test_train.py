"""Training: sizes and ids as promised, exact round trips, the same result however it is run, and clear refusals."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from lmkit.errors import BadInput
from lmkit.tokenization.byte_level import BYTE_CHARACTERS, SPLITS
from lmkit.tokenization.chat import SPECIAL_TOKENS, encode_text
from lmkit.tokenization.measure import round_trip
from lmkit.tokenization.train import train_tokenizer

KINDS = ("bpe", "sentencepiece_bpe", "sentencepiece_unigram")


def random_text(draw, length):
    """Characters of every kind: controls, ASCII, any plane, marks, spaces, SentencePiece's own."""
    ranges = [(0, 32), (32, 127), (127, 0x300), (0x300, 0x370), (0x2580, 0x2590), (0x4E00, 0x9FFF), (0xE000, 0x10FFFF)]
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, documents):
    return train_tokenizer(lambda: documents, vocab_size=384, kind=request.param, allow_smaller_vocab=True)


def test_ids_and_size(trained):
    assert trained.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(20))
    assert len(trained) == 384
    assert trained.pad_token_id == 3
    assert trained.eos_token_id == 0


def test_every_text_comes_back_exactly(trained):
    draw = random.Random(0)
    texts = [random_text(draw, draw.randrange(40)) for _ in range(400)]
    texts += [
        "<0x0A>",
        "<unk>",
        "a \u2581b",
        "<|im_end|>",
        "  two  spaces  ",
        "\r\n",
        bytes(range(256)).decode("latin-1"),
    ]
    assert [text for text in texts if not round_trip(trained, text)] == []


def test_no_text_becomes_a_special_token(trained):
    text = " ".join(SPECIAL_TOKENS) + "".join(SPECIAL_TOKENS) + "<unk><0x00>"
    ids = encode_text(trained, text)
    assert min(ids) >= 20
    assert trained.decode(ids) == text


def test_the_directories_load_without_lmkit(tmp_path, documents):
    expected = []
    for kind in KINDS:
        tokenizer = train_tokenizer(lambda: documents, vocab_size=384, kind=kind, allow_smaller_vocab=True)
        tokenizer.save_pretrained(tmp_path / kind)
        expected.append(f"{tokenizer('The lowest caf' + chr(0xE9) + chr(10))['input_ids']} True 3")
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "for path in sys.argv[1:]:\n"
        "    t = AutoTokenizer.from_pretrained(path)\n"
        "    print(t('The lowest caf\\u00e9\\n')['input_ids'], t.chat_template is not None, t.pad_token_id)\n"
        "assert 'lmkit' not in sys.modules"
    )
    paths = [tmp_path / kind for kind in KINDS]
    output = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == expected


def test_bytes_have_ids_in_the_order_of_their_values(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(range(20, 276))) == BYTE_CHARACTERS


def test_digits_stand_alone_under_the_default_split(tokenizer):
    assert len(encode_text(tokenizer, "2026")) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_is_exact(split, documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, split=split)
    text = "I'M  here's 12345 (ok)...\n\n  \tand caf\u00e9's \u65e5\u672c"
    assert round_trip(tokenizer, text)
    digits = [tokenizer.decode([i]) for i in encode_text(tokenizer, "12345")]
    assert all(len(d) <= 3 for d in digits) or split == "gpt2"


def test_nfc_composes(documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, nfc=True)
    assert encode_text(tokenizer, "e\u0301") == encode_text(tokenizer, "\u00e9")
    assert not round_trip(tokenizer, "e\u0301")


def test_max_token_length_bounds_every_token(documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, max_token_length=4, allow_smaller_vocab=True)
    tokens = tokenizer.convert_ids_to_tokens(list(range(20, len(tokenizer))))
    assert max(len(token) for token in tokens if not token.startswith("<|")) == 4


def test_named_special_tokens_take_reserved_places(documents):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, special_tokens=["<|tool|>", "<|think|>"])
    assert tokenizer.convert_ids_to_tokens([3, 4, 5, 6]) == ["<|pad|>", "<|tool|>", "<|think|>", "<|reserved_2|>"]
    assert tokenizer("<|tool|>")["input_ids"] == [4]


def test_threads_do_not_matter(tmp_path, documents):
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    code = (
        "import json, sys; from lmkit.tokenization.train import train_tokenizer\n"
        "d = json.load(open(sys.argv[1]))\n"
        "print(*[train_tokenizer(lambda: d, vocab_size=384, trainer=t).backend_tokenizer.to_str() for t in "
        "('tokenizers', 'auto')])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "documents.json"],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_documents_does_not_matter(kind, documents):
    def trained_on(order):
        options = {"vocab_size": 384, "kind": kind, "allow_smaller_vocab": True}
        return train_tokenizer(lambda: order, **options).backend_tokenizer.to_str()

    shuffled = random.Random(1).sample(documents, len(documents))
    assert trained_on(documents) == trained_on(shuffled)


def test_a_long_run_costs_no_more_than_twice_normal_text(trained):
    def seconds(text):
        started = time.process_time()
        encode_text(trained, text)
        return time.process_time() - started

    normal = "The lowest tower is older than 25 of the newest ones. "
    usual = min(seconds((normal * 4000)[:200_000]) for _ in range(2))
    for run in ("a", "=", " ", "\n", "\u65e5"):
        length = 200_000 // len(run.encode())
        assert min(seconds(run * length) for _ in range(2)) <= 2 * usual + 0.02, repr(run)


@pytest.mark.parametrize("trainer", ["tokenizers", "auto"])
def test_learning_from_a_long_run_costs_no_more_than_twice_normal_text(trainer, documents):
    def seconds(text):
        started = time.process_time()
        train_tokenizer(lambda: [*documents, text], vocab_size=384, allow_smaller_vocab=True, trainer=trainer)
        return time.process_time() - started

    usual = min(seconds((documents[0] * 2000)[:200_000]) for _ in range(3))
    for run in ("a", "ab", " "):
        assert min(seconds(run * (200_000 // len(run))) for _ in range(3)) <= 2 * usual + 0.1, repr(run)


def test_a_corpus_too_small_is_refused_unless_allowed(documents):
    with pytest.raises(BadInput, match=r"supports a vocabulary of \d+, not 32768.*allow_smaller_vocab"):
        train_tokenizer(lambda: documents, vocab_size=32768)
    reached = train_tokenizer(lambda: documents, vocab_size=32768, allow_smaller_vocab=True)
    assert len(reached) % 128 == 0
    assert len(reached) < 1024
    assert reached.convert_ids_to_tokens(len(reached) - 1).startswith("<|reserved_")


@pytest.mark.parametrize("size", [0, 256, 275, 383, 1000])
def test_impossible_sizes_are_refused_with_a_possible_one(size, documents):
    with pytest.raises(BadInput, match=r"Set it to (384|1024)"):
        train_tokenizer(lambda: documents, vocab_size=size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corpus", [[], [""], [" \n", "\t"]])
def test_an_empty_corpus_is_refused(kind, corpus):
    with pytest.raises(BadInput, match="holds no text"):
        train_tokenizer(lambda: corpus, vocab_size=384, kind=kind)


@pytest.mark.parametrize(
    "names",
    [
        [""],
        [" "],
        ["the"],
        ["a"],
        ["<|a"],
        ["<||>"],
        ["<|a b|>"],
        ["<|x|>", "<|x|>"],
        ["<|im_end|>"],
        ["<|reserved_9|>"],
    ],
)
def test_unusable_special_tokens_are_refused(names, documents):
    with pytest.raises(BadInput, match="special token"):
        train_tokenizer(lambda: documents, vocab_size=384, special_tokens=names)


def test_too_many_special_tokens_are_refused(documents):
    with pytest.raises(BadInput, match="17 special tokens"):
        train_tokenizer(lambda: documents, vocab_size=384, special_tokens=[f"<|x{i}|>" for i in range(17)])
