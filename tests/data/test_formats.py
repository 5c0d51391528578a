"""Rows in the forms people have them become TRL's columns, or an error that says what to write."""

import pytest
from datasets import Dataset

from lmkit.data.formats import _transcript, inspect_rows, to_preferences, to_prompt_completion, to_prompts
from lmkit.errors import BadInput

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
HELLO, BYE = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Bye"}
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]


def rows(*items: dict) -> Dataset:
    return Dataset.from_list(list(items))


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", "Hello"),
        ({"prompt": [SYSTEM, USER], "completion": [HELLO]}, [SYSTEM, USER], "Hello"),
        ({"messages": [USER, HELLO, USER, BYE]}, [USER, HELLO, USER], "Bye"),
        ({"messages": [USER, HELLO], "system": "Be kind."}, [SYSTEM, USER], "Hello"),
        ({"conversations": SHAREGPT}, [SYSTEM, USER], "Hello"),
        ({"conversations": [USER, HELLO]}, [USER], "Hello"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Hi", "Hello"),
        ({"instruction": "Say", "input": "Hi", "output": "Hello"}, "Say\n\nHi", "Hello"),
        ({"instruction": "Hi", "input": None, "output": "Hello", "system": "Be kind."}, [SYSTEM, USER], "Hello"),
        ({"instruction": "Hi", "output": "Bye", "history": [["Hi", "Hello"]]}, [USER, HELLO, USER], "Bye"),
        ({"instruction": "Hi", "output": "Hello", "system": "", "history": []}, "Hi", "Hello"),
        ({"question": "Hi", "answer": "Hello"}, "Hi", "Hello"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": "Hello"}, [USER], "Hello"),
        ({"prompt": [USER, {"role": "assistant", "content": " \n"}], "completion": "Hello"}, [USER], "Hello"),
    ],
)
def test_demonstrations(row, prompt, completion):
    made = to_prompt_completion(rows(row | {"id": 7}))
    assert made.to_list() == [{"prompt": prompt, "completion": completion, "id": 7}]


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}, "Hi"),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]}, [USER]),
        ({"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, BYE]}, [USER]),
        ({"chosen": [SYSTEM, USER, HELLO], "rejected": [SYSTEM, USER, BYE]}, [SYSTEM, USER]),
        ({"chosen": HH + " Hello", "rejected": HH + " Bye"}, [USER, HELLO, USER]),
        (
            {
                "conversations": SHAREGPT[:2],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Bye"},
            },
            [SYSTEM, USER],
        ),
        ({"instruction": "Say", "input": "Hi", "chosen": "Hello", "rejected": "Bye"}, "Say\n\nHi"),
        ({"question": "Hi", "chosen": "Hello", "rejected": "Bye"}, "Hi"),
    ],
)
def test_preferences_and_their_prompts(row, prompt):
    made = to_preferences(rows(row | {"id": 7}))
    assert made.to_list() == [{"prompt": prompt, "chosen": "Hello", "rejected": "Bye", "id": 7}]
    assert to_prompts(rows(row))[0]["prompt"] == row.get("prompt", prompt)


def test_texts_among_transcripts_become_conversations():
    data = rows({"prompt": "Hi", "completion": "Bye"}, {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": "Bye"})
    assert to_prompt_completion(data)["prompt"] == [[USER], [USER]]


def test_transcripts_keep_names_inside_paragraphs_and_empty_turns():
    talk = "\n\nHuman: He wrote\nHuman: no.\n\nAnd Assistant: too.\n\nAssistant:\n\nHuman: And?\n\nAssistant:"
    made = to_preferences(rows({"chosen": talk + " Yes.\n\nIndeed.", "rejected": talk}))[0]
    assert [turn["content"] for turn in made["prompt"]] == ["He wrote\nHuman: no.\n\nAnd Assistant: too.", "", "And?"]
    assert [turn["role"] for turn in made["prompt"]] == ["user", "assistant", "user"]
    assert (made["chosen"], made["rejected"]) == ("Yes.\n\nIndeed.", "")


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: a", [("user", "a")]),
        ("\n\nHuman: a\n\nAssistant: b", [("user", "a"), ("assistant", "b")]),
        ("\n\nHuman:a\n\nAssistant:b", [("user", "a"), ("assistant", "b")]),
        ("\n\nHuman: a\n\nHuman: b", [("user", "a"), ("user", "b")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [("user", "a"), ("assistant", "b"), ("assistant", "c")]),
        ("\n\nHuman:\n\nAssistant:", [("user", ""), ("assistant", "")]),
        ("\n\nHuman: a\n\n\n\nAssistant: b\n\n", [("user", "a"), ("assistant", "b")]),
        ("\n\nHuman: Human: a", [("user", "Human: a")]),
        ("\n\nHuman: a Human: b\nHuman: c\n Assistant: d", [("user", "a Human: b\nHuman: c\n Assistant: d")]),
        (
            "\n\nHuman: a\n\nHumans: b\n\nhuman: c\n\nThe Human: d",
            [("user", "a\n\nHumans: b\n\nhuman: c\n\nThe Human: d")],
        ),
        ("\n\nHuman: a\n\nAssistant : b", [("user", "a\n\nAssistant : b")]),
        ("\n\nHuman: a\n\nb\n\n- c", [("user", "a\n\nb\n\n- c")]),
    ],
)
def test_the_turns_of_a_transcript(text, turns):
    assert [(turn["role"], turn["content"]) for turn in _transcript(text)] == turns


@pytest.mark.parametrize(
    ("row", "prompt", "extra"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", {"completion": "Hello"}),
        ({"question": "Hi", "answer": "Hello"}, "Hi", {"answer": "Hello"}),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Hi", {"output": "Hello"}),
        ({"messages": [USER, HELLO]}, [USER], {}),
        ({"messages": [USER]}, [USER], {}),
    ],
)
def test_prompts_keep_what_a_reward_function_may_need(row, prompt, extra):
    assert to_prompts(rows(row)).to_list() == [{"prompt": prompt, **extra}]


def test_mapping_names_columns_and_keeps_the_others():
    data = rows({"query": "Hi", "reply": "Hello", "prompt": "unused", "answer": "4"})
    made = to_prompt_completion(data, {"prompt": "query", "completion": "reply"})
    assert made.to_list() == [{"prompt": "Hi", "completion": "Hello", "answer": "4"}]
    swapped = to_prompt_completion(
        rows({"prompt": "Hello", "completion": "Hi"}), {"prompt": "completion", "completion": "prompt"}
    )
    assert swapped.to_list() == [{"prompt": "Hi", "completion": "Hello"}]
    assert to_prompts(rows({"dialog": SHAREGPT}), {"messages": "dialog"})[0]["prompt"] == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"promt": "a"}, "names promt; it maps prompt, completion"),
        ({"prompt": "c"}, "from the column c, which is not there. Its columns are a, b"),
        ({"prompt": "a", "completion": "a"}, "takes two columns from the same one"),
    ],
)
def test_bad_mappings(mapping, message):
    with pytest.raises(BadInput, match=message):
        to_prompt_completion(rows({"a": "1", "b": "2"}), mapping)


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        (
            to_prompt_completion,
            {"a": "1", "b": "2"},
            r"my.csv has the columns a, b.* mapping: {prompt: a, completion: b}",
        ),
        (to_prompt_completion, {"text": "1"}, "alone are for pretraining"),
        (to_prompt_completion, {"prompt": "1"}, r"mapping: {prompt: prompt, completion: COLUMN}"),
        (to_preferences, {"prompt": "1", "good": "2", "bad": "3"}, r"{prompt: prompt, chosen: good, rejected: bad}"),
        (to_prompts, {"query": "1"}, r"Rename the columns .* in sft and preferences, .* mapping: {prompt: query}"),
    ],
)
def test_unknown_columns_name_what_was_found_and_the_mapping_to_write(convert, row, message):
    with pytest.raises(BadInput, match=message):
        convert(rows(row), source_name="my.csv")


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        (to_prompt_completion, {"messages": [USER]}, "row 1  ends without an assistant turn"),
        (to_prompt_completion, {"messages": [HELLO]}, "no user turn to answer"),
        (to_prompt_completion, {"messages": []}, "where a conversation was wanted"),
        (to_prompt_completion, {"messages": [{"role": "narrator", "content": "x"}]}, "a turn of 'narrator'"),
        (to_prompt_completion, {"prompt": "Hi", "completion": None}, "has no answer"),
        (to_prompt_completion, {"prompt": " ", "completion": "x"}, "has an empty prompt"),
        (to_prompt_completion, {"prompt": [USER], "completion": [USER]}, "the turns user where one answer was wanted"),
        (to_preferences, {"chosen": "Hello", "rejected": "Bye"}, "has no prompt"),
        (to_preferences, {"chosen": [SYSTEM, USER, HELLO], "rejected": [USER, BYE]}, "differ before their last turn"),
        (
            to_preferences,
            {"chosen": HH + " a", "rejected": "\n\nHuman: No\n\nAssistant: b"},
            "differ before their last",
        ),
    ],
)
def test_rows_that_do_not_fit(convert, row, message):
    with pytest.raises(BadInput, match=message):
        convert(rows(row))


@pytest.mark.parametrize(
    ("convert", "row"),
    [
        (to_prompt_completion, {"prompt": [USER, HELLO], "completion": "Bye"}),
        (to_prompt_completion, {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello", "completion": "Bye"}),
        (to_preferences, {"prompt": [USER, HELLO], "chosen": "a", "rejected": "b"}),
        (to_preferences, {"conversations": SHAREGPT, "chosen": "a", "rejected": "b"}),
        (to_preferences, {"chosen": [USER, HELLO, HELLO], "rejected": [USER, HELLO, BYE]}),
    ],
)
def test_words_of_the_assistant_before_its_answer_are_refused_not_lost(convert, row):
    with pytest.raises(
        BadInput, match=r"ends with the assistant's turn 'Hello'.*wanted.*Move that turn into the compl"
    ):
        convert(rows(row))


def test_prompts_are_what_stands_before_the_last_answer():
    assert to_prompts(rows({"prompt": [USER, HELLO]}))["prompt"] == [[USER]]
    assert to_prompts(rows({"messages": [USER, HELLO, USER, BYE]}))["prompt"] == [[USER, HELLO, USER]]


def test_a_pair_of_single_turns_of_a_user_has_no_prompt():
    with pytest.raises(BadInput, match="no user turn to answer"):
        to_preferences(rows({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}))


def test_few_bad_rows_are_left_out_and_more_are_an_error():
    good, bad = {"prompt": "Hi", "completion": "Hello", "id": 1}, {"prompt": "", "completion": "Hello", "id": 2}
    with pytest.warns(UserWarning, match="left out 1 of 100 rows; row 3  has an empty prompt"):
        made = to_prompt_completion(rows(good, good, bad, *[good] * 97))
    assert set(made["id"]) == {1}
    assert len(made) == 99
    with pytest.raises(
        BadInput, match=r"2 of 100 .*; row 1 .*; row 2 .* in the file; sft and preferences .*--on_bad skip"
    ):
        to_prompt_completion(rows(bad, bad, *[good] * 98))
    with pytest.warns(UserWarning, match="left out 98 of 100 rows"):
        assert len(to_prompt_completion(rows(good, good, *[bad] * 98), on_bad="skip")) == 2
    with pytest.raises(BadInput, match="3 of 3 rows cannot be used"):
        to_prompt_completion(rows(*[bad] * 3), on_bad="skip")


def test_inspection_counts():
    train = rows(
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "x"},
        {"prompt": "c", "chosen": "x", "rejected": " \n"},
    )
    held_out = rows(
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "x", "rejected": "z"},
        {"prompt": "d", "chosen": "x", "rejected": "y"},
    )
    assert inspect_rows(train, held_out) == {
        "rows": 4,
        "duplicates": 1,
        "no_target": 1,
        "equal_pairs": 1,
        "held_out_rows": 3,
        "held_out_in_train": 1,
        "held_out_prompts_in_train": 2,
    }
    assert inspect_rows(rows({"prompt": [USER]}, {"prompt": [USER]})) == {"rows": 2, "duplicates": 1}
