"""The converted models give SentencePiece's own ids."""

import pytest

from lmkit.errors import BadInput
from lmkit.tokenization import sentencepiece_trainer
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.train import train_tokenizer

PROBES = [
    "The lowest tower is older.",
    "a  b   c    d",
    "   lead and trail   ",
    "tabs\tand\nlines\n\n",
    "1234 5.6 -7",
    "na\u00efve \u65e5\u672c\u8a9e \u0434\u0430 \U0001f642 \u00df",
    "unseenwordsofmanyletters" * 10,
    "NUL\0 and \x07",
    "return [word.lower()]  # ok",
    "",
]


@pytest.fixture(scope="module", params=["sentencepiece_bpe", "sentencepiece_unigram"])
def pair(request, documents):
    """A converted tokenizer and the model it was converted from."""
    models = []
    convert = sentencepiece_trainer.convert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sentencepiece_trainer, "convert", lambda model, *rest: models.append(model) or convert(model, *rest)
        )
        tokenizer = train_tokenizer(lambda: documents, vocab_size=512, kind=request.param, allow_smaller_vocab=True)
    return tokenizer, models[0]


def test_ids_equal_sentencepieces(pair, documents):
    tokenizer, model = pair
    for text in [*PROBES, *documents]:
        assert encode_text(tokenizer, text) == model.encode(text), repr(text)


def test_the_model_is_lossless_where_sentencepiece_is_not(pair):
    tokenizer, model = pair
    text = "a\u2581b"
    assert model.decode(model.encode(text)) == "a b"
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_the_sample_is_bounded_and_does_not_depend_on_order(monkeypatch):
    monkeypatch.setattr(sentencepiece_trainer, "SAMPLE_CHARACTERS", 1000)
    documents = [f"document {i} " + "x" * 50 for i in range(500)]
    sample = sentencepiece_trainer._sample(documents)
    assert 900 < sum(map(len, sample)) <= 1000
    assert sentencepiece_trainer._sample(reversed(documents)) == sample


def test_a_vocabulary_without_room_for_the_characters_is_refused():
    corpus = ["".join(chr(0x4E00 + i) for i in range(j, j + 50)) for j in range(0, 2000, 25)]
    with pytest.raises(BadInput, match="Change vocab_size"):
        train_tokenizer(lambda: corpus, vocab_size=384, kind="sentencepiece_bpe")


def test_longest_pieces(documents):
    tokenizer = train_tokenizer(
        lambda: documents, vocab_size=384, kind="sentencepiece_bpe", max_token_length=3, allow_smaller_vocab=True
    )
    pieces = [p for p in tokenizer.get_vocab() if not p.startswith("<")]
    assert max(map(len, pieces)) == 3
