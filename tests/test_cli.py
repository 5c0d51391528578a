import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmkit.artifact import seal
from lmkit.cli import app, find_models
from lmkit.config import StageConfig, knob, source
from lmkit.errors import BadInput
from lmkit.stage import Stage


class Example(StageConfig):
    output_dir: Path = knob(Path("unused"), "where to write")
    upstream: Path | None = source(None, "input")


def finish(directory, artifact, text, upstream=None):
    stage = Stage(directory.name, Example(output_dir=directory, upstream=upstream))
    with stage:
        with stage.seal(artifact) as folder:
            (folder / "weights").write_text(text)
        stage.finish({})


def lmkit(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture
def run(tmp_path):
    """A run whose first two stages are finished and whose third was interrupted."""
    run = tmp_path / "runs" / "tiny"
    finish(run / "tokenizer", "tokenizer", "t" * 2000)
    finish(run / "pretrain", "model", "m", upstream=run / "tokenizer" / "tokenizer")
    with seal(run / "sft" / "checkpoints" / "step-000120") as folder:
        (folder / "weights").write_text("w")
    (run / "sft" / "plan.json").write_text('{"fingerprint": "0123456789abcdef"}')
    (run / "sft" / "exit.json").write_text('{"code": 75, "reason": "stopped after step 120 of 300"}')
    return run


def lines_by_stage(output):
    return {line.split()[0]: line for line in output.splitlines() if line.strip()}


def test_status_shows_each_stage_and_what_comes_next(run):
    code, output = lmkit("status", run)
    lines = lines_by_stage(output)
    assert code == 0
    record = json.loads((run / "tokenizer" / "stage.json").read_text())
    assert lines["tokenizer"].endswith(f"kB  {record['fingerprint'][:12]}  finished")
    assert "ended with 75: stopped after step 120 of 300; goes on from step-000120" in lines["sft"]
    assert "0123456789ab" in lines["sft"]
    assert "absent" in lines["ppo"]
    *_, reason, command = output.strip().splitlines()
    assert reason == "next: sft (ended with 75: stopped after step 120 of 300; goes on from step-000120)"
    assert command.strip() == "python recipes/rlhf.py ... --from sft"
    (run / "configs").mkdir()
    (run / "configs" / "sft.yaml").touch()
    _, output = lmkit("status", run)
    assert output.splitlines()[-1].strip() == f"python recipes/sft.py --config {run}/configs/sft.yaml"


def test_status_tells_a_stage_made_from_another_input(run):
    (run / "tokenizer").rename(run / "tokenizer.old-1")
    finish(run / "tokenizer", "tokenizer", "another")
    _, output = lmkit("status", run)
    assert "finished, but upstream changed since" in lines_by_stage(output)["pretrain"]
    assert "next: pretrain (finished, but upstream changed since)" in output
    assert "--redo pretrain" in output


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "pretrain/model/weights").unlink(), "damaged: model is not what was sealed"),
        (lambda run: (run / "pretrain/model/weights").write_text("longer"), "damaged: model is not what was sealed"),
        (lambda run: (run / "pretrain/stage.json").write_text("{"), "stage.json is damaged"),
        (lambda run: edit(run / "pretrain/stage.json", seed=7), "stage.json is damaged or was edited"),
    ],
)
def test_status_tells_what_is_damaged_without_hashing(run, damage, said):
    damage(run)
    code, output = lmkit("status", run)
    assert code == 0
    assert said in lines_by_stage(output)["pretrain"]
    assert "--redo pretrain" in output


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_status_tells_a_stage_that_was_killed(run):
    (run / "sft" / "exit.json").unlink()
    _, output = lmkit("status", run)
    assert lines_by_stage(output)["sft"].endswith("killed; goes on from step-000120")


def test_status_tells_who_works_on_a_stage(run):
    with (run / "sft" / ".lock").open("a+") as lock:
        lock.write("process 7 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, output = lmkit("status", run)
    assert "running (process 7 on here)" in output
    _, output = lmkit("status", run)
    assert "running" not in output, "a lock file that nobody holds says nothing"


def test_verify_hashes_artifacts_and_checkpoints(run):
    code, output = lmkit("verify", run)
    assert code == 0
    assert output.count("ok ") == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "pretrain/model/weights").write_text("n"), "weights is damaged"),
        (lambda run: (run / "sft/checkpoints/step-000120/weights").unlink(), "weights is missing"),
        (lambda run: (run / "pretrain/model/MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    ],
)
def test_verify_ends_with_5_and_names_what_is_damaged(run, damage, said):
    damage(run)
    code, output = lmkit("verify", run)
    assert code == 5
    assert said in output
    assert output.count("ok ") == 2, "the others are still checked"
    assert "1 of 3 are damaged" in output


def test_verify_refuses_an_artifact_that_is_whole_but_not_the_recorded_one(run):
    with seal(run / "pretrain" / "model") as folder:
        (folder / "weights").write_text("another")
    code, output = lmkit("verify", run)
    assert code == 5
    assert "not what" in output


@pytest.mark.parametrize("command", ["status", "verify", "report", "chat"])
def test_a_wrong_run_is_exit_code_2_and_names_what_is_there(run, command):
    code, output = lmkit(command, run.parent / "tini")
    assert code == 2
    assert "has tiny" in output
    assert "Traceback" not in output


def test_help_answers_without_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lmkit.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\nsys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("status", "verify", "report", "chat", "tokenizer"):
        assert command in result.stdout


# -------------------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def folders(tmp_path):
    for stage in ("pretrain", "sft", "ppo"):
        (tmp_path / "tiny" / stage / "model").mkdir(parents=True)
        (tmp_path / "tiny" / stage / "model" / "config.json").touch()
    return tmp_path


def test_the_latest_model_of_a_run_is_chosen(folders):
    run = folders / "tiny"
    assert find_models(run, []) == {"ppo": run / "ppo" / "model"}
    assert find_models(run, ["sft", "ppo"]) == {"sft": run / "sft" / "model", "ppo": run / "ppo" / "model"}
    assert find_models(run / "sft", []) == find_models(run / "sft" / "model", []) == {"sft": run / "sft" / "model"}


@pytest.mark.parametrize(
    ("path", "compare", "message"),
    [
        ("tini", [], "tini has no model that talks.*has tiny"),
        (".", [], "has no model that talks.*ppo/model or sft/model or pretrain/model.*has tiny"),
        ("tiny", ["sft", "dpo"], "no model dpo. It has ppo, sft, pretrain"),
        ("tiny/sft", ["sft", "ppo"], "is one model; --compare sft,ppo needs a run"),
    ],
)
def test_a_wrong_model_says_what_is_there(folders, path, compare, message):
    with pytest.raises(BadInput, match=message):
        find_models(folders / path, compare)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run with random sft and ppo models."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lmkit.tokenization.train import train_tokenizer

    tokenizer = train_tokenizer(lambda: ["a fox and a squirrel " * 3], vocab_size=384, allow_smaller_vocab=True)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes)
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for seed, stage in enumerate(("sft", "ppo")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(run / stage / "model")
        tokenizer.save_pretrained(run / stage / "model")
    return run


def test_tokenizer_explain_tells_the_ids(models):
    code, output = lmkit("tokenizer", "explain", "squirrel", "--tokenizer", models / "sft" / "model")
    assert code == 0
    ids = output.splitlines()[-1].split()
    assert ids[0] == "ids"
    assert "".join(part.partition("=")[0] for part in ids[1:]) == "squirrel"
    code, output = lmkit("tokenizer", "explain", "squirrel", "--tokenizer", models / "absent")
    assert code == 2
    assert "does not exist" in output


def test_tokenizer_measure_shows_files_and_other_tokenizers(models, tmp_path):
    directory = models / "sft" / "model"
    (tmp_path / "a.txt").write_text("a fox and a squirrel\n\nan owl")
    code, output = lmkit("tokenizer", "measure", directory, tmp_path / "a.txt", "--compare", models / "ppo" / "model")
    assert code == 0
    table = {line.split("  ")[0]: line for line in output.splitlines()}
    numbers = table[str(tmp_path / "a.txt")].split()[1:]
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]
    assert float(numbers[0]) > 1
    assert table["documents changed"].split()[-2:] == ["0", "0"]
    assert f"longest tokens of {directory}: ' squirrel'" in output
    for wrong, message in (
        ((models / "absent", tmp_path / "a.txt"), "nothing is fetched"),
        (("no/such", tmp_path / "a.txt"), "nothing is fetched"),
        ((directory, tmp_path / "b.txt"), "does not exist"),
    ):
        code, output = lmkit("tokenizer", "measure", *wrong)
        assert (code, message in output) == (2, True)


def test_chat_from_a_pipe(models):
    arguments = ["chat", str(models), "--compare", "sft,ppo", "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, arguments, input="a fox\n\na squirrel\n")
    assert result.exit_code == 0
    names, answers = zip(*(line.split("\t", 1) for line in result.stdout.splitlines()))
    assert names == ("sft", "ppo", "sft", "ppo")
    assert len(set(answers)) == 4
    assert "\x1b" not in result.stdout
    assert CliRunner().invoke(app, arguments, input="/tmp\n").exit_code == 2


def test_chat_at_a_terminal(models):
    main, terminal = pty.openpty()
    program = [sys.executable, "-c", "from lmkit.cli import app; app()"]
    process = subprocess.Popen(
        [*program, "chat", str(models / "ppo"), "--max-new-tokens", "8"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    shown = ""

    def wait_for(text, nudge=lambda: None):
        nonlocal shown
        deadline = time.time() + 60
        while text not in shown:
            assert time.time() < deadline, f"no {text!r} in {shown!r}"
            nudge()
            if select.select([main], [], [], 1)[0]:
                shown += os.read(main, 4096).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        wait_for("> ")
        os.write(main, b"a fox\n")
        wait_for("\r\n> ")
        os.write(main, b"/tmp\n")
        wait_for("/tmp is not a command")
        wait_for("> ")
        # readline misses a signal that comes just before it starts to wait: a person would press again.
        wait_for("(stopped; /quit leaves)", nudge=lambda: process.send_signal(signal.SIGINT))
        wait_for("> ")
        os.write(main, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(main)
