import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmkit.artifact import seal
from lmkit.config import StageConfig, knob, setting
from lmkit.errors import BadInput, CorruptInput, Interrupted, Locked
from lmkit.stage import Stage, latest_checkpoint, read_record, rotate


class Example(StageConfig):
    output_dir: Path = knob(Path("unused"), "where to write")
    data: Path = setting(Path("unused"), "input")
    steps: int = setting(3, "how many")
    logging_steps: int = knob(1, "how often")
    train: dict = setting({"learning_rate": 1.0, "logging_steps": 5}, "passed on")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "data.txt").write_text("some text")
    return Example(output_dir=tmp_path / "run" / "example", data=tmp_path / "data.txt")


def finish(config):
    stage = Stage("example", config)
    if not stage.finished:
        with stage:
            with stage.seal("model") as folder:
                (folder / "w").write_text(str(config.steps))
            stage.finish({"loss": 1.5})
        return "ran"
    return "skipped"


def test_a_finished_stage_is_skipped_and_its_record_says_what_was_done(config):
    assert finish(config) == "ran"
    record = read_record(config.output_dir)
    assert record["metrics"] == {"loss": 1.5}
    assert set(record["artifacts"]) == {"model"}
    assert record["inputs"]["data"]["path"] == str(config.data)
    assert {"versions", "git_commit", "hardware", "seconds", "seed", "peak_memory_bytes"} <= set(record)
    assert finish(config) == "skipped"


def test_the_seconds_of_starts_that_were_stopped_count(config):
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "metrics.jsonl").write_text('{"step": 1, "seconds": 60.5}\n{"step": 2, "seconds": 100.5}\n')
    finish(config)
    assert 100.5 <= read_record(config.output_dir)["seconds"] < 110


@pytest.mark.parametrize("change", [{"logging_steps": 9}, {"train": {"learning_rate": 1.0, "logging_steps": 1}}])
def test_knobs_do_not_enter_the_fingerprint(config, change):
    finish(config)
    assert finish(config.model_copy(update=change)) == "skipped"


def test_a_moved_run_is_still_finished(config, tmp_path):
    finish(config)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = config.model_copy(update={"output_dir": tmp_path / "moved" / "example"})
    assert finish(moved) == "skipped"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 4}, "steps: 3, now 4"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"train": {"learning_rate": 2.0}}, r"train\.learning_rate: 1\.0, now 2\.0"),
    ],
)
def test_other_settings_are_refused_and_the_field_named(config, change, said):
    finish(config)
    with pytest.raises(BadInput, match=said):
        finish(config.model_copy(update=change))


@pytest.mark.parametrize(("steps", "said"), [(3, None), (4, "steps: None, now 4")])
def test_a_setting_the_record_does_not_know_may_have_its_default_alone(config, steps, said):
    finish(config.model_copy(update={"steps": steps}))
    record = read_record(config.output_dir)
    del record["config"]["steps"], record["id"]
    (config.output_dir / "stage.json").write_text(json.dumps(record | {"fingerprint": "of an earlier version"}))
    if said is None:
        assert finish(config) == "skipped"
    else:
        with pytest.raises(BadInput, match=said):
            finish(config.model_copy(update={"steps": steps}))


def test_a_changed_input_is_refused_and_named(config):
    finish(config)
    config.data.write_text("other text")
    with pytest.raises(BadInput, match="content of data"):
        finish(config)


def test_a_begun_stage_with_other_settings_is_refused_too(config):
    stage = Stage("example", config)
    with pytest.raises(RuntimeError), stage:
        raise RuntimeError
    with pytest.raises(BadInput, match="steps: 3, now 4"):
        Stage("example", config.model_copy(update={"steps": 4})).finished  # noqa: B018


def test_a_damaged_artifact_is_not_skipped(config):
    finish(config)
    (config.output_dir / "model" / "w").write_text("9")
    with pytest.raises(CorruptInput, match="damaged"):
        finish(config)


def test_latest_checkpoint_falls_back_past_a_damaged_one(tmp_path, capsys):
    for step in (1, 2, 3):
        with seal(tmp_path / f"step-{step:06d}") as folder:
            (folder / "w").write_text(str(step))
    (tmp_path / "step-000003" / "w").write_text("x")
    assert latest_checkpoint(tmp_path).name == "step-000002"
    assert "step-000003/w" in capsys.readouterr().err
    assert [p.name.startswith(".corrupt-step-000003") for p in tmp_path.glob(".corrupt-*")] == [True]
    assert latest_checkpoint(tmp_path / "empty") is None


def test_rotate_keeps_the_newest_also_after_a_million_steps(tmp_path):
    for step in (1, 999_900, 1_000_000):
        with seal(tmp_path / f"step-{step:06d}"):
            pass
    rotate(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000000", "step-999900"]
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_rotate_counts_only_what_is_whole(tmp_path, capsys):
    for step in (1, 2, 3, 4):
        with seal(tmp_path / f"step-{step:06d}") as folder:
            (folder / "w").write_text(str(step))
    (tmp_path / "step-000003" / "w").write_text("x")
    rotate(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004"]
    assert "step-000003/w is damaged" in capsys.readouterr().err


def test_a_link_in_the_directory_is_refused(config, tmp_path):
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"metrics.jsonl is a link"), Stage("example", config):
        pass


def test_a_directory_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be written \(Not a directory\)"):
        finish(config.model_copy(update={"output_dir": tmp_path / "file" / "example"}))
    with pytest.raises(BadInput, match="without control characters"):
        finish(config.model_copy(update={"output_dir": tmp_path / "a\nb"}))


def test_a_copy_that_comes_late_does_not_do_the_work_again(config):
    late = Stage("example", config)
    assert not late.finished
    finish(config)
    with pytest.raises(Locked, match="finished by another process"), late:
        pass


def test_an_edited_record_is_refused(config):
    finish(config)
    path = config.output_dir / "stage.json"
    path.write_text(path.read_text().replace('"loss": 1.5', '"loss": 0.5'))
    with pytest.raises(CorruptInput, match="damaged or was edited"):
        finish(config)


def test_the_last_ending_is_forgotten_when_work_begins(config):
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "exit.json").write_text('{"code": 75, "reason": "x"}')
    with Stage("example", config):
        assert not (config.output_dir / "exit.json").exists()


def test_signal_interrupts_at_once_until_the_loop_asks(config):
    with pytest.raises(Interrupted), Stage("example", config):  # noqa: PT012 - the signal arrives in the sleep
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    with Stage("example", config) as stage:
        assert not stage.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stage.stop_requested()


RECIPE = '''"""A recipe for a test."""
import sys, time
from pathlib import Path
from lmkit.config import StageConfig, knob, setting
from lmkit.errors import BadInput, Stopped
from lmkit.stage import Stage, run

class Config(StageConfig):
    output_dir: Path = knob(Path("out"), "where to write")
    do: str = setting("finish", "what to do")

def main(config):
    stage = Stage("example", config)
    if stage.finished:
        return stage.directory
    with stage:
        print("working", flush=True)
        if config.do == "guard":
            raise Stopped("the loss is not finite at step 3.")
        if config.do == "input":
            raise BadInput("data.txt is empty. Give it a line.")
        if config.do == "bug":
            1 / 0
        if config.do == "full":
            raise OSError(28, "No space left on device", "out/model")
        if config.do == "wait":
            while not stage.stop_requested():
                time.sleep(0.01)
            from lmkit.errors import Interrupted
            raise Interrupted("stopped at step 7, saved.")
        with stage.seal("model") as folder:
            (folder / "w").write_text("1")
        stage.finish({})
    return stage.directory

run(main, Config, __doc__)
'''


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)

    def start(*flags):
        command = [sys.executable, "recipe.py", *flags]
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("finish", 0, ""),
        ("input", 2, "error: data.txt is empty"),
        ("guard", 4, "error: the loss is not finite"),
        ("bug", 1, "ZeroDivisionError"),
        ("full", 75, "No space left for out/model"),
    ],
)
def test_exit_codes_and_exit_json(recipe, tmp_path, what, code, said):
    process = recipe("--do", what)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in stderr
    assert ("Traceback" in stderr) == (what == "bug")
    assert json.loads((tmp_path / "out" / "exit.json").read_text())["code"] == code


def test_a_wrong_flag_starts_nothing(recipe, tmp_path):
    process = recipe("--does", "x")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "does  unknown option. Did you mean do?" in stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_exits_75_and_a_second_copy_is_locked_out_naming_the_holder(recipe, tmp_path):
    holder = recipe("--do", "wait")
    assert holder.stdout.readline() == "working\n"
    second = recipe("--do", "wait")
    _, stderr = second.communicate(timeout=60)
    assert second.returncode == 3
    assert f"process {holder.pid} on" in stderr
    holder.send_signal(signal.SIGINT)
    _, stderr = holder.communicate(timeout=10)
    assert holder.returncode == 75
    assert "stopped at step 7, saved." in stderr
    assert "Go on with the same command: python recipe.py --do wait" in stderr
    assert json.loads((tmp_path / "out" / "exit.json").read_text())["code"] == 75


def test_help_lists_every_option(recipe):
    process = recipe("--help")
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--do" in stdout
    assert "what to do [finish]" in stdout
