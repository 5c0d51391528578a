"""The arithmetic of benchmarks/transfer.py, by hand."""

import json
import sys

import numpy as np
import pytest

from benchmarks import transfer


def test_the_interval_worked_by_hand():
    """Mean 0.2, deviation 0.1, three pairs: 0.2 -+ 4.303 * 0.1 / sqrt(3)."""
    assert transfer.interval([0.1, 0.2, 0.3]) == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)


def test_a_way_is_compared_with_scratch_seed_by_seed(monkeypatch, capsys):
    found = {"scratch": [0.5, 0.7], "frozen": [0.6, 0.9]}
    monkeypatch.setattr(transfer, "accuracy", lambda way, seed, *rest: found[way][seed])
    monkeypatch.setattr(sys, "argv", ["transfer.py", "body", "data", "--ways", "frozen", "--seeds", "2"])
    transfer.run()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [*["accuracy_scratch", "accuracy_frozen"] * 2, "gain_frozen"]
    assert rows[-1]["value"] == pytest.approx(0.15)
    assert (rows[-1]["config"]["low"], rows[-1]["config"]["high"]) == pytest.approx((-0.4853, 0.7853), abs=1e-3)


def test_rates_are_chosen_on_other_seeds_and_images(tmp_path, monkeypatch, capsys):
    (tmp_path / "train").mkdir()
    asked = []

    def accuracy(way, seed, args, data, folder, rate):
        asked.append((way, seed, data, round(rate, 6)))
        return 0.5

    monkeypatch.setattr(transfer, "accuracy", accuracy)
    words = ["transfer.py", "body", str(tmp_path), "--ways", "full", "--seeds", "2", "--choose", "--rates", "full=3e-3"]
    monkeypatch.setattr(sys, "argv", words)
    transfer.run()
    assert {(seed, data) for _, seed, data, _ in asked} == {(10, tmp_path / "train"), (11, tmp_path / "train")}
    rates = [json.loads(line)["config"]["learning_rate"] for line in capsys.readouterr().out.splitlines()]
    assert rates == [rate for way, _, _, rate in asked[::2]]
    assert rates[-3:] == [0.001, 0.003, 0.009]
    assert rates[0] == round(transfer.RATES["scratch"] / 3, 6)
    monkeypatch.setattr(sys, "argv", [*words[:2], "builtin:digits", *words[3:]])
    with pytest.raises(SystemExit):
        transfer.run()


def test_digits_get_a_frame_and_keep_their_splits(tmp_path):
    pytest.importorskip("sklearn", reason="the vision extra is not installed")
    arrays = np.load(transfer.framed_digits(tmp_path))
    assert arrays["x_train"].shape == (1438, 12, 12)
    assert arrays["y_test"].shape == (359,)
    assert arrays["x_train"][:, :2].max() == arrays["x_train"][:, :, -2:].max() == 0 < arrays["x_train"][:, 2].max()
