"""The preferences stage at nano size: sampled and labelled pairs, given pairs, and the split by prompt."""

import pytest
from datasets import load_from_disk
from preferences import PreferencesConfig, main

from lmkit.errors import BadInput, Interrupted
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
    ids = [
        read_record(main(config(nano, tmp_path / f"p{i}", seed=seed)))["artifacts"] for i, seed in enumerate([3, 3, 4])
    ]
    assert ids[0] == ids[1] != ids[2]


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


def test_a_signal_while_sampling_leaves_nothing_half_done(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "stop_requested", lambda self: True)
    with pytest.raises(Interrupted):
        main(config(nano, tmp_path / "preferences"))
    assert not (tmp_path / "preferences/data").exists()
