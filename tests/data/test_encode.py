"""Ready ids: only the completion counts, its stop token included, and what does not fit is counted or refused."""

import pytest
from datasets import Dataset

from lmkit.data.encode import encode_demonstrations, encode_pairs
from lmkit.errors import BadInput
from lmkit.tokenization.chat import render
from lmkit.tokenization.train import train_tokenizer

ROWS = [
    {"prompt": "Name a fox.", "completion": "Her name is Ida."},
    {"prompt": "Say <|im_end|> twice.", "completion": "<|im_end|><|im_end|>"},
    {"prompt": "Name a fox.", "completion": "Her name is Ida."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: ["the fox said hello to the fox"] * 9, vocab_size=384, allow_smaller_vocab=True)


def test_labels_are_the_completion_with_its_stop_token(tokenizer):
    dataset, counts = encode_demonstrations(Dataset.from_list(ROWS), tokenizer, max_length=200)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, encoded in zip(ROWS, dataset):
        prompt_ids, completion_ids = render(tokenizer, row["prompt"], row["completion"])
        assert encoded["input_ids"] == prompt_ids + completion_ids
        assert encoded["labels"] == [-100] * len(prompt_ids) + completion_ids
        assert encoded["labels"].count(stop) == 1
    assert (counts["rows"], counts["kept"], counts["over_max_length"]) == (3, 3, 0)


def test_long_rows_are_an_error_that_says_what_fits(tokenizer):
    rows = Dataset.from_list([*ROWS, {"prompt": "Go on.", "completion": "and on " * 50}])
    with pytest.raises(BadInput, match=r"1 of 4 rows \(25.0%\) are longer than max_length 100.*--max_length") as error:
        encode_demonstrations(rows, tokenizer, max_length=100)
    longest = int(str(error.value).split("all in ")[1].split(":")[0])
    assert encode_demonstrations(rows, tokenizer, max_length=longest)[1]["kept"] == 4


def test_long_rows_are_dropped_or_cut_where_asked(tokenizer):
    rows = Dataset.from_list([*ROWS, {"prompt": "Go on.", "completion": "and on " * 50}])
    dropped, counts = encode_demonstrations(rows, tokenizer, max_length=100, on_truncation="drop")
    assert (len(dropped), counts["over_max_length"]) == (3, 1)
    cut, _ = encode_demonstrations(rows, tokenizer, max_length=100, on_truncation="cut")
    assert len(cut[3]["input_ids"]) == len(cut[3]["labels"]) == 100
    assert cut[3]["labels"][-1] != -100


def test_a_cut_that_leaves_no_target_drops_the_row(tokenizer):
    rows = Dataset.from_list([ROWS[0], {"prompt": "why " * 100, "completion": "Because."}])
    cut, _ = encode_demonstrations(rows, tokenizer, max_length=100, on_truncation="cut")
    assert len(cut) == 1


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(BadInput, match="none of the 3 rows"):
        encode_demonstrations(Dataset.from_list(ROWS), tokenizer, max_length=5, on_truncation="drop")


def test_an_empty_completion_is_an_error_that_names_the_row(tokenizer):
    rows = Dataset.from_list([ROWS[0], {"prompt": "Say nothing.", "completion": ""}])
    with pytest.raises(BadInput, match="row 1 has an empty completion"):
        encode_demonstrations(rows, tokenizer, max_length=100)


def test_pairs_share_the_prompt_and_equal_ones_are_dropped(tokenizer):
    rows = [
        {"prompt": "Name a fox.", "chosen": "Ida.", "rejected": "No."},
        {"prompt": "Name a fox.", "chosen": "Ida.", "rejected": "Ida."},
    ]
    dataset, counts = encode_pairs(Dataset.from_list(rows), tokenizer, max_length=100)
    prompt_ids, chosen_ids = render(tokenizer, "Name a fox.", "Ida.")
    assert dataset[0]["chosen_ids"] == prompt_ids + chosen_ids
    assert dataset[0]["rejected_ids"][: len(prompt_ids)] == prompt_ids
    assert (counts["rows"], counts["kept"], counts["equal"]) == (2, 1, 1)
