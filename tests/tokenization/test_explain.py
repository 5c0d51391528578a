"""The steps that are shown lead to the tokenizer's own ids."""

import re

import pytest

from lmkit.errors import BadInput
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.explain import explain
from lmkit.tokenization.train import train_tokenizer

TEXT = "lower newest caf\u00e9 \u65e5\u672c <|im_end|>\n25"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"])
def test_the_ids_are_the_tokenizers(kind, documents, tmp_path):
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, kind=kind, allow_smaller_vocab=True)
    tokenizer.save_pretrained(tmp_path)
    shown = [line for line in explain(tmp_path, TEXT).splitlines() if line.strip().startswith("ids")]
    ids = [int(i) for line in shown for i in re.findall(r"=(\d+)(?= |$)", line)]
    assert ids == encode_text(tokenizer, TEXT)


def test_the_merges_are_shown_in_their_order(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    lines = [line.split(maxsplit=1) for line in explain(tmp_path, " lowest").splitlines()]
    assert lines[0] == ["word", "\u2423 l o w e s t"]
    numbers = [int(name) for name, _ in lines[1:-1]]
    assert numbers == sorted(numbers)
    assert len(lines[-2][1]) < len(lines[0][1])
    assert lines[-2][1] == re.sub(r"=\d+", "", lines[-1][1])


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"tokenizer\.json does not exist"):
        explain(tmp_path, "x")
