"""Ready ids: only the completion counts, its stop token included, and what does not fit is counted or refused."""

import copy

import pytest
from datasets import Dataset

from lmkit.data.encode import encode_demonstrations, encode_pairs, short_prompts
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
    assert sum(counts["length_histogram"].values()) == 3


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
    assert dataset[0]["row"] == 0
    assert (counts["rows"], counts["kept"], counts["equal"]) == (2, 1, 1)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fox."},
    {"role": "assistant", "content": "Ida."},
    {"role": "user", "content": "And a hen <|im_end|>."},
]


def test_every_turn_of_the_assistant_is_learnt_where_asked(tokenizer):
    """The labels are the ids of each turn with its stop token, as the model would have drawn them."""
    rows = Dataset.from_list([{"prompt": CONVERSATION, "completion": "Bea."}])
    last, _ = encode_demonstrations(rows, tokenizer, max_length=200)
    every, _ = encode_demonstrations(rows, tokenizer, max_length=200, assistant_only_loss=True)
    assert every[0]["input_ids"] == last[0]["input_ids"]
    first, second = (render(tokenizer, CONVERSATION[:n], answer)[1] for n, answer in ((2, "Ida."), (4, "Bea.")))
    assert [label for label in last[0]["labels"] if label != -100] == second
    assert [label for label in every[0]["labels"] if label != -100] == first + second
    assert all(label in (-100, token) for label, token in zip(every[0]["labels"], every[0]["input_ids"]))
    texts = Dataset.from_list(ROWS)
    assert encode_demonstrations(texts, tokenizer, 200, assistant_only_loss=True)[0]["labels"][0][0] == -100


@pytest.mark.parametrize("first", [[], [{"role": "user", "content": "Name a fox."}]])
def test_a_turn_of_the_assistant_that_answers_nothing_is_context_alone(tokenizer, first):
    """One that opens the conversation, and the second of two; what is learnt is otherwise the same."""
    talk = [*first, *({"role": "assistant", "content": words} for words in ("Ida.", "Or Una.")), *CONVERSATION[1:]]
    rows = Dataset.from_list([{"prompt": talk, "completion": "Bea."}])
    encoded = encode_demonstrations(rows, tokenizer, max_length=300, assistant_only_loss=True)[0][0]
    asked = [n for n, turn in enumerate(talk) if turn["role"] == "user" and n + 1 < len(talk)]
    answers = [render(tokenizer, talk[: n + 1], talk[n + 1]["content"])[1] for n in asked]
    answers.append(render(tokenizer, talk, "Bea.")[1])
    assert len(answers) == len(first) + 2
    assert [label for label in encoded["labels"] if label != -100] == [i for ids in answers for i in ids]
    assert encoded["input_ids"] == encode_demonstrations(rows, tokenizer, max_length=300)[0][0]["input_ids"]


def test_a_template_that_rewrites_earlier_turns_cannot_teach_them(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    rows = Dataset.from_list([{"prompt": CONVERSATION, "completion": "Bea."}])
    with pytest.raises(BadInput, match=r"earlier turns otherwise than its last one.*Leave out --assistant_only_loss"):
        encode_demonstrations(rows, forgetful, max_length=200, assistant_only_loss=True)


def test_rows_that_are_all_cut_off_teach_no_stop(tokenizer):
    rows = Dataset.from_list([{"prompt": "Go on.", "completion": "and on " * 50}] * 2)
    with pytest.raises(BadInput, match=r"all 2 rows are cut off at max_length 100.*never learn to stop"):
        encode_demonstrations(rows, tokenizer, max_length=100, on_truncation="cut")
    rows = Dataset.from_list([ROWS[0], {"prompt": "Go on.", "completion": "and on " * 50}])
    assert encode_demonstrations(rows, tokenizer, max_length=100, on_truncation="cut")[1]["taught_to_stop"] == 1


def test_a_margin_travels_and_must_be_a_number(tokenizer):
    row = {"prompt": "Name a fox.", "chosen": "Ida.", "rejected": "No.", "margin": 2}
    dataset, _ = encode_pairs(Dataset.from_list([row]), tokenizer, max_length=100, margin="margin")
    assert dataset[0]["margin"] == 2.0
    assert "margin" not in encode_pairs(Dataset.from_list([row]), tokenizer, max_length=100)[0].column_names
    with pytest.raises(BadInput, match="no column 'gap'; found prompt, chosen, rejected, margin"):
        encode_pairs(Dataset.from_list([row]), tokenizer, max_length=100, margin="gap")
    with pytest.raises(BadInput, match="row 1 of the pairs has None in the column margin; wanted a finite number"):
        encode_pairs(Dataset.from_list([row, row | {"margin": None}]), tokenizer, max_length=100, margin="margin")


def test_short_prompts_leave_the_most_room(tokenizer):
    rows = Dataset.from_list([{"prompt": "word " * n} for n in (9, 2, 5, 2, 7)])
    prompts, room = short_prompts(rows, tokenizer, max_length=100, num=3)
    assert prompts == ["word " * n for n in (2, 5, 7)]
    assert room == 100 - len(render(tokenizer, "word " * 7)[0])
