"""The preferences stage at nano size: sampled and labelled pairs, given pairs, and the split by prompt."""

import json

import pytest
from datasets import Dataset, load_from_disk
from preferences import PreferencesConfig, main

from lmkit.data.encode import encode_pairs
from lmkit.data.sources import check_rows
from lmkit.errors import BadInput, Interrupted
from lmkit.generation import complete as complete_module
from lmkit.generation.complete import complete, complete_shared
from lmkit.label.store import Answers, answers_path, read_pairs
from lmkit.models.heads import last_token_scores
from lmkit.models.load import load_reward_model
from lmkit.stage import Stage, read_record
from lmkit.tokenization.chat import render


def config(nano, directory, **changes):
    values = {
        "output_dir": directory,
        "model": nano / "model",
        "prompts": str(nano / "prompts.train.jsonl"),
        "num_pairs": 20,
        "max_new_tokens": 48,
        "heldout_fraction": 0.25,
        # An untrained model writes no stories: gold would make every pair a tie.
        "labeler": "test_preferences_scores:score",
    }
    return PreferencesConfig(**(values | changes))


@pytest.fixture(autouse=True)
def stops(monkeypatch):
    """Every eighth token ends a completion, for an untrained model seldom draws the one that does."""
    monkeypatch.setattr(complete_module, "stop_token_ids", lambda tokenizer: list(range(0, 512, 8)))


@pytest.fixture(autouse=True)
def labeler(tmp_path, monkeypatch):
    module = "def score(prompts, completions):\n    return [len(text) for text in completions]\n"
    (tmp_path / "test_preferences_scores.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)


def test_pairs_are_sampled_labelled_and_divided_by_prompt(nano, tmp_path, capsys):
    directory = main(config(nano, tmp_path / "preferences", flip=0.0, annotator_temperature=0.0))
    data = load_from_disk(str(directory / "data"))
    assert set(data) == {"train", "heldout"}
    for split in data.values():
        assert split.column_names == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
        assert all(len(row["chosen"]) > len(row["rejected"]) for row in split)
    assert not set(data["train"]["prompt"]) & set(data["heldout"]["prompt"])
    metrics = read_record(directory)["metrics"]
    assert len(data["train"]) + len(data["heldout"]) + metrics["ties"] == 20
    assert (metrics["ceiling"], metrics["eos_rate"]) == (1.0, 1.0)
    assert "cut_off" not in data["train"].column_names
    said = capsys.readouterr().out
    assert "ties" in said
    assert "chosen:" in said


def test_a_completion_that_was_cut_off_has_no_stop_token_anywhere(nano, reward_model, tmp_path, monkeypatch):
    """Not for the reward model that learns from the pairs, nor for one that labels them; and after people too."""
    drawn = []

    def watched(*arguments, **options):
        drawn[:] = complete(*arguments, **options)
        return drawn

    monkeypatch.setattr(complete_module, "complete", watched)
    directory = main(config(nano, tmp_path / "preferences", max_new_tokens=8, labeler=str(reward_model)))
    cut = {completion.text for completion in drawn if not completion.finished}
    assert 0 < len(cut) < len(drawn)
    rows = [row for split in load_from_disk(str(directory / "data")).values() for row in split]
    model, tokenizer = load_reward_model(reward_model)
    pairs, _ = encode_pairs(Dataset.from_list(rows), tokenizer, 400)
    for row, pair in zip(rows, pairs, strict=True):
        for name in ("chosen", "rejected"):
            prompt, completion = render(tokenizer, row["prompt"], row[name])
            ids = prompt + (completion[:-1] if row[name] in cut else completion)
            assert pair[f"{name}_ids"] == ids
            assert last_token_scores(model, [ids]).item() == pytest.approx(row[f"score_{name}"], abs=1e-4)
    with pytest.raises(Interrupted):
        main(config(nano, tmp_path / "people", max_new_tokens=8, labeler="people"))
    for pair in read_pairs(tmp_path / "people/pairs.jsonl"):
        assert pair.columns == {"cut_off": [text for text in pair.completions if text in cut]}


@pytest.mark.parametrize("read", ["stage", "chain"])
def test_prompts_are_read_by_mapping_and_without_bad_rows(nano, tmp_path, read):
    path = tmp_path / "prompts.jsonl"
    texts = [" ", *(json.loads(line)["prompt"] for line in (nano / "prompts.train.jsonl").read_text().splitlines())]
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    given = config(nano, tmp_path / "preferences", prompts=str(path), mapping={"prompt": "query"})
    start = main if read == "stage" else lambda config: check_rows("preferences", config)
    with pytest.raises(BadInput, match=r"1 of 13 rows cannot be used.*has an empty prompt.*--on_bad skip"):
        start(given)
    with pytest.warns(UserWarning, match="left out 1 of 13 rows"):
        start(config(nano, tmp_path / "skip", prompts=str(path), mapping={"prompt": "query"}, on_bad="skip"))


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(nano, tmp_path):
    options = {"a": {"seed": 3}, "b": {"seed": 3, "report_to": ["tensorboard"]}, "c": {"seed": 4}}
    folders = [main(config(nano, tmp_path / name, **given)) for name, given in options.items()]
    ids = [read_record(folder)["artifacts"] for folder in folders]
    assert ids[0] == ids[1] != ids[2]
    assert [(folder / "tensorboard").exists() for folder in folders] == [False, True, False]


def test_given_pairs_need_no_model(pairs, tmp_path):
    directory = main(PreferencesConfig(output_dir=tmp_path / "preferences", data=str(pairs), model=None))
    data = load_from_disk(str(directory / "data"))
    assert len(data["train"]) + len(data["heldout"]) == 40
    assert data["train"].column_names == ["prompt", "chosen", "rejected"]
    assert read_record(directory)["metrics"]["given"] is True


def test_gold_labels_other_prompts_are_refused(nano, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 2 + 2?"}\n')
    changes = {"prompts": str(path), "num_pairs": 2, "labeler": "lmkit.evaluation.label:gold"}
    with pytest.raises(BadInput, match="--labeler"):
        main(config(nano, tmp_path / "preferences", **changes))


def test_names_of_labelers():
    assert PreferencesConfig(labeler="gold").labeler == PreferencesConfig().labeler
    assert PreferencesConfig(labeler="people").labeler is None
    assert PreferencesConfig(labeler="my:score").labeler == "my:score"


def test_a_stop_while_sampling_goes_on_to_the_same_bytes(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(complete_shared.__kwdefaults__, "chunk_size", 16)
    whole = read_record(main(config(nano, tmp_path / "whole")))["artifacts"]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "stop_requested", lambda self: True)
        for done in (16, 32):
            with pytest.raises(Interrupted, match=f"stopped after {done} of 40 completions, which are kept"):
                main(config(nano, tmp_path / "stopped"))
    assert not (tmp_path / "stopped/data").exists()
    monkeypatch.setattr(complete_module, "sample", counted := Counted(complete_module.sample))
    assert read_record(main(config(nano, tmp_path / "stopped")))["artifacts"] == whole
    assert counted.prompts == 8
    assert not (tmp_path / "stopped/completions").exists()


class Counted:
    """A sampler that counts the prompts it is given."""

    def __init__(self, sample):
        self.sample, self.prompts = sample, 0

    def __call__(self, model, prompts, **options):
        self.prompts += len(prompts)
        return self.sample(model, prompts, **options)


def test_three_completions_a_prompt(nano, tmp_path):
    directory = main(config(nano, tmp_path / "preferences", num_generations=3, num_pairs=20, flip=0.0))
    metrics = read_record(directory)["metrics"]
    assert metrics["num_train"] + metrics["num_heldout"] + metrics["ties"] == 20
    prompts = [row["prompt"] for split in load_from_disk(str(directory / "data")).values() for row in split]
    assert len(set(prompts)) <= 7
    assert max(prompts.count(prompt) for prompt in set(prompts)) <= 3


def test_people_label_between_two_calls_of_one_command(nano, tmp_path):
    directory = tmp_path / "preferences"
    people = {"labeler": "people", "num_pairs": 12}
    with pytest.raises(Interrupted, match=r"Label its pairs: `lmkit label \S+/pairs.jsonl --annotator NAME`"):
        main(config(nano, directory, **people))
    with pytest.raises(Interrupted, match="12 of 12 pairs wait for a person"):
        main(config(nano, directory, **people))
    answers, pairs = Answers(answers_path(directory / "pairs.jsonl", "anna")), read_pairs(directory / "pairs.jsonl")
    for number, pair in enumerate(pairs):
        answers.add(pair.id, "tie" if number == 5 else "second", False, 1)
    answers.close()
    main(config(nano, directory, **people))
    rows = [row for split in load_from_disk(str(directory / "data")).values() for row in split]
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        pair.completions[::-1] for number, pair in enumerate(pairs) if number != 5
    }
    metrics = read_record(directory)["metrics"]
    assert (metrics["undecided"], metrics["num_annotators"]) == (1, 1)
    assert "Cohen" not in (log := (directory / "log.txt").read_text())
    assert "12/12" in log
