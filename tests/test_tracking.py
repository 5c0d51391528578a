import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lmkit import tracking
from lmkit.errors import BadInput
from lmkit.tracking import Tracker, read_jsonl


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rows_hold_step_seconds_metrics_and_speed(tmp_path):
    with Tracker(tmp_path, total_steps=2) as tracker:
        tracker.log(1, {"loss": torch.tensor(2.5), "lr": 1e-3}, tokens=4096)
        tracker.log(2, {"eval_loss": 2.25})
    first, second = rows(tmp_path / "metrics.jsonl")
    assert list(first) == ["step", "seconds", "loss", "lr", "tokens_per_second"]
    assert (first["step"], first["loss"], first["lr"]) == (1, 2.5, 1e-3)
    assert first["tokens_per_second"] > 0
    assert "tokens_per_second" not in second


def test_speed_is_tokens_over_the_time_since_the_last_row(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with Tracker(tmp_path, total_steps=2) as tracker:
        tracker.log(1, {}, tokens=1000)
        tracker.log(2, {}, tokens=1000)
    assert [(r["seconds"], r["tokens_per_second"]) for r in rows(tmp_path / "metrics.jsonl")] == [(2, 500), (6, 250)]


def test_non_finite_values_are_kept_as_text(tmp_path):
    with Tracker(tmp_path, total_steps=1) as tracker:
        tracker.log(1, {"loss": float("nan"), "grad_norm": torch.tensor(float("inf")), "kl": -float("inf")})
        tracker.sample(1, [{"prompt": "a", "scores": [1.0, float("nan")]}])
    assert rows(tmp_path / "metrics.jsonl")[0] | {"seconds": 0} == {
        "step": 1, "seconds": 0, "loss": "nan", "grad_norm": "inf", "kl": "-inf",
    }  # fmt: skip
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "a", "scores": [1.0, "nan"]}]


def test_resume_drops_what_comes_after_the_checkpoint(tmp_path):
    with Tracker(tmp_path, total_steps=4) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step})
            tracker.sample(step, [{"prompt": f"line\u2028separator {step}"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a row
    with Tracker(tmp_path, total_steps=4, start_step=2) as tracker:
        tracker.log(3, {"loss": 30})
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in metrics] == [(1, 1), (2, 2), (3, 30)]
    assert [r["step"] for r in rows(tmp_path / "samples.jsonl")] == [1, 2]


def test_seconds_go_on_where_the_kept_rows_ended(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 103.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with Tracker(tmp_path, total_steps=2) as tracker:
        tracker.log(1, {})
    with Tracker(tmp_path, total_steps=2, start_step=1) as tracker:
        tracker.log(2, {})
    assert [row["seconds"] for row in rows(tmp_path / "metrics.jsonl")] == [5, 8]


def test_a_fresh_start_empties_both_files(tmp_path):
    with Tracker(tmp_path, total_steps=2) as tracker:
        tracker.log(0, {"loss": 1})
        tracker.sample(0, [{"prompt": "a"}])
    with Tracker(tmp_path, total_steps=2):
        pass
    assert rows(tmp_path / "metrics.jsonl") == rows(tmp_path / "samples.jsonl") == []


def test_only_the_main_process_writes(tmp_path, monkeypatch, capsys):
    with Tracker(tmp_path / "a", total_steps=1, accelerator=SimpleNamespace(is_main_process=False)) as tracker:
        tracker.log(1, {"loss": 1})
        tracker.sample(1, [{"prompt": "a"}])
    monkeypatch.setenv("RANK", "1")
    with Tracker(tmp_path / "b", total_steps=1) as tracker:
        tracker.log(1, {"loss": 1})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_terminal_one_plain_line_in_ten_seconds(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, *(step * 1.0 for step in range(1, 31))])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with Tracker(tmp_path, total_steps=30, description="pretrain") as tracker:
        for step in range(1, 31):
            tracker.log(step, {"loss": 2.0, "lr": 1e-3, "a": 1, "b": 2, "not_shown": 3}, tokens=2048)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4, "at 1, 11, 21 and 30 s"
    assert lines[1] == "pretrain  11/30  2048 tok/s  loss 2  lr 0.001  a 1  b 2  ETA 0:19"
    assert lines[-1].endswith("ETA 0:00")


def test_the_eta_of_a_resumed_run_counts_its_own_steps_only(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with Tracker(tmp_path, total_steps=110, start_step=90) as tracker:
        tracker.log(100, {})
    assert capsys.readouterr().out.strip().endswith("ETA 0:10")


@pytest.mark.parametrize(("columns", "all_facts"), [("100", True), ("60", False)])
def test_a_terminal_gets_a_bar_whose_facts_give_way(tmp_path, monkeypatch, columns, all_facts):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", screen)
    with Tracker(tmp_path, total_steps=4, description="sft") as tracker:
        tracker.log(2, {"loss": 1.5, "a": 1, "b": 2, "c": 3}, tokens=1)
    shown = screen.getvalue()
    for part in ("sft", "2/4", "ETA", "tok/s"):
        assert part in shown
    assert ("c 3" in shown) == all_facts
    assert "\x1b[" in shown, "drawn in place"


def test_tensorboard_holds_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Tracker(tmp_path, total_steps=2, report_to=["tensorboard"]) as tracker:
        tracker.log(1, {"loss": 2.0, "note": "text is left out"})
        tracker.log(2, {"loss": 1.0})
    with Tracker(tmp_path, total_steps=3, start_step=1, report_to=["tensorboard"]) as tracker:
        tracker.log(2, {"loss": 1.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert events.Tags()["tensors"] == []


def test_a_picture_in_a_row_is_a_file_and_tensorboard_shows_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture = Image.new("L", (3, 2), 200)
    with Tracker(tmp_path, total_steps=2, report_to=["tensorboard"]) as tracker:
        tracker.sample(2, [{"of": "noise", "drawn": picture}])
    (row,) = rows(tmp_path / "samples.jsonl")
    assert row == {"step": 2, "of": "noise", "drawn": "samples/step-000002-0-drawn.png"}
    assert Image.open(tmp_path / row["drawn"]).getpixel((1, 1)) == (200, 200, 200)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("drawn")
    assert (image.step, image.width, image.height) == (2, 3, 2)


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "unknown tracker 'tensorbord'"), ("aim", "pip install")])
def test_a_tracker_that_cannot_start_says_why(tmp_path, name, message):
    with pytest.raises(BadInput, match=message), Tracker(tmp_path, total_steps=1, report_to=[name]):
        pass


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:2 is not JSON"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_importing_it_brings_no_torch():
    code = "import sys, lmkit.tracking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
