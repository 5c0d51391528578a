import math
from pathlib import Path

import pytest

from lmkit.config import Config, StageConfig, explain, knob, load, setting, to_yaml, validate
from lmkit.errors import BadInput
from lmkit.strict_yaml import parse_yaml


class Train(Config):
    learning_rate: float = setting(1e-3, "step size", gt=0)
    max_steps: int = setting(10, "optimizer steps")


class Example(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/example"), "where to write")
    train: Train = Train(max_steps=30)
    passed_on: dict = setting({"optim": "adamw", "bf16": False}, "keys for another library")
    dry_run: bool = knob(False, "only says what it would do")


def test_flags_over_file_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\ntrain: {learning_rate: 5e-4}\npassed_on: {bf16: true}\n")
    config = load(Example, ["--config", str(file), "--seed=4", "--passed_on.optim", "sgd"])
    assert config.seed == 4
    # A section given in part keeps the recipe's own default (30), not the section class's (10).
    assert config.train == Train(learning_rate=5e-4, max_steps=30)
    assert config.passed_on == {"optim": "sgd", "bf16": True}


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--dry-run"], True),
        (["--dry-run", "--seed", "1"], True),
        (["--dry_run", "false"], False),
        (["--dry_run", "true", "--seed", "1"], True),
        (["--dry_run=false"], False),
    ],
)
def test_a_switch_stands_alone_or_with_its_value(argv, wanted):
    config = load(Example, argv)
    assert (config.dry_run, config.seed) == (wanted, int("--seed" in argv))


def test_every_mistake_is_reported_at_once_with_the_near_name():
    argv = ["--train.learning_rte", "1", "--seed", "x", "--max_steps", "3", "--train.max_steps", "2.5"]
    with pytest.raises(BadInput) as caught:
        load(Example, argv)
    message = str(caught.value)
    assert "4 mistakes" in message
    assert "train.learning_rte  unknown option. Did you mean learning_rate?" in message
    assert "max_steps  unknown option. Did you mean train.max_steps?" in message
    assert "seed  Input should be a valid integer" in message
    assert "found 2.5" in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["learning_rate", "1"], "is not a flag"),
        (["--seed"], "--seed needs a value"),
        (["--train", "3", "--train.max_steps", "4"], "sets a key inside train"),
        (["--config", "no/such.yaml"], "does not exist"),
        (["--train.learning_rate", "-1"], "greater than 0"),
        (["--seed", "{a: 1, a: 2}"], "given twice"),
    ],
)
def test_bad_command_lines(argv, said):
    with pytest.raises(BadInput, match=said):
        load(Example, argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2\n", "holds a list; wanted a mapping"),
        ("a: 1\na: 2\n", r"the key a is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases are not supported"),
        ("a: [1\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=said):
        load(Example, ["--config", str(file)])


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        load(Example, ["--config", str(file)])


def test_scalars_are_yaml_1_2():
    values = parse_yaml("[1e-4, 12:30, on, yes, 010, true, null, .inf, 1_000, 2026-11-20]", "test")
    assert values == [1e-4, "12:30", "on", "yes", 10.0, True, None, math.inf, 1000, "2026-11-20"]


def test_dump_reads_back_equal(tmp_path):
    config = validate(Example, {"train": {"learning_rate": 1e-5}, "passed_on": {"text": "1e-4"}})
    file = tmp_path / "a.yaml"
    file.write_text(to_yaml(config))
    assert load(Example, ["--config", str(file)]) == config


def test_explain_shows_this_recipes_defaults():
    assert ("train.max_steps", "30", "optimizer steps") in explain(Example)
