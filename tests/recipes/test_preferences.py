"""The preferences stage at nano size: sampled and labelled pairs, given pairs, and the split by prompt."""

import pytest
from datasets import load_from_disk
from preferences import PreferencesConfig, main

from lmkit.errors import BadInput, Interrupted
from lmkit.generation import complete as complete_module
from lmkit.generation.complete import complete_shared
from lmkit.label.store import Answers, answers_path, read_pairs
from lmkit.stage import Stage, read_record


def config(nano, directory, **changes):
    values = {
        "output_dir": directory,
        "model": nano / "model",
        "prompts": str(nano / "prompts.train.jsonl"),
        "num_pairs": 20,
        "max_new_tokens": 12,
        "heldout_fraction": 0.25,
        # An untrained model writes no stories: gold would make every pair a tie.
        "labeler": "test_preferences_scores:score",
    }
    return PreferencesConfig(**(values | changes))


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
    assert metrics["ceiling"] == 1.0
    said = capsys.readouterr().out
    assert "ties" in said
    assert "chosen:" in said


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
