"""A run stopped anywhere and gone on with is the run that was never stopped; a changed setting is refused."""

import types
from typing import Union, get_args, get_origin

import pytest

from lmkit.config import Config
from lmkit.errors import BadInput
from lmkit.rounds import CHAIN
from lmkit.stage import KNOBS, Stage, read_record
from lmkit.strict_yaml import read_mapping
from tests.faults.harness import config_class
from tests.faults.test_damage import StopAfter

TRAINER = {
    "plain": [],
    "accumulation": ["--train.gradient_accumulation_steps", 3],
    "workers": ["--train.dataloader_num_workers", 2],
    "bf16": ["--train.bf16", "true"],
    "last partial batch": ["--train.per_device_train_batch_size", 5],
    "epochs": ["--train.max_steps", -1, "--train.num_train_epochs", 2],
}
LOOP = {
    "plain": [],
    "accumulation": ["--train.gradient_accumulation_steps", 3],
    "stream": ["--packing", "stream"],
    "adamw": ["--train.optim", "adamw_torch_fused"],
    "bf16": ["--train.bf16", "true"],
}
PPO = {"separate critic": ["--train.critic", "separate"], "bf16": ["--train.bf16", "true"], "plain": []}
CASES = [("pretrain", name) for name in LOOP] + [("sft", name) for name in TRAINER]
CASES += [("reward", name) for name in ("plain", "accumulation", "epochs")] + [("ppo", name) for name in PPO]


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_stopping_anywhere_changes_no_bit(harness, tally, everything, stage, name):
    """T3, T4 stopped at the first, a middle and the last step but one"""
    sample = [("pretrain", "plain"), ("sft", "accumulation"), ("ppo", "separate critic")]
    if not everything and (stage, name) not in sample:
        pytest.skip("a sample: FAULTS=all tries each")
    flags = {"pretrain": LOOP, "ppo": PPO}.get(stage, TRAINER)[name]
    whole = harness.fresh(stage)
    code, output = harness.run(stage, whole, *flags)
    assert code == 0, output
    twice = [2, 2] if stage == "ppo" else [4, 2]  # of 5 iterations, or of at least 8 steps
    for steps in ([1], [3], twice) if everything else ([3],):
        directory = harness.fresh(stage)
        for stop in steps:
            code, output = harness.run(stage, directory, *flags, hook=StopAfter(stop))
            assert code == 75, output
        code, output = harness.run(stage, directory, *flags)
        assert code == 0, output
        same = read_record(directory)["artifacts"] == read_record(whole)["artifacts"]
        assert tally.count(same), f"stopped at {steps}: other bytes"
    tally.figure = "bit for bit"


# ------------------------------------------------------------------------------------------------------ fingerprints


def another(value, annotation):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 128
    if isinstance(value, float):
        return value / 2 + 1e-9
    if isinstance(value, list):
        return [*value, "<|more|>"]
    if isinstance(value, dict):
        return value | {"more": "x"}
    choices = [c for part in (annotation, *get_args(annotation)) for c in get_args(part) if isinstance(c, str)]
    if choices:
        return next(c for c in choices if c != value)
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return 7 if int in kinds else 0.5 if float in kinds else f"{value}x"


def flipped(config, prefix=()):
    """(dotted name, whether it decides the result, the configuration with that field changed), for all but paths."""
    for name, field in type(config).model_fields.items():
        value, extra = getattr(config, name), field.json_schema_extra or {}
        if isinstance(value, Config):
            for inner, decides, changed in flipped(value, (*prefix, name)):
                yield inner, decides, config.model_copy(update={name: changed})
        elif "Path" not in str(field.annotation) and not extra.get("source"):
            changed = config.model_copy(update={name: another(value, field.annotation)})
            yield ".".join((*prefix, name)), not extra.get("knob"), changed
        if isinstance(value, dict) and name == "train":
            for key in (*value, "save_total_limit", "weight_decay"):
                changed = config.model_copy(update={name: value | {key: str(value.get(key)) + "x"}})
                yield f"{name}.{key}", key not in KNOBS, changed


def test_every_setting_is_in_the_fingerprint_or_a_knob(harness, tally):
    """T6 each setting of each stage flipped: what decides the result is refused and named, knobs are not"""
    import importlib

    for stage in CHAIN:
        cls = config_class(importlib.import_module(stage))
        config = cls.model_validate(read_mapping(harness.folder / "configs" / f"{stage}.yaml"))
        reference = Stage(stage, config).fingerprint
        assert reference == read_record(config.output_dir)["fingerprint"]
        for name, decides, changed in flipped(config):
            now = Stage(stage, changed)
            assert tally.count((now.fingerprint != reference) == decides), f"{stage}.{name}: decides {decides}"
            if decides:
                with pytest.raises(BadInput, match=name.split(".")[-1]):
                    now.finished  # noqa: B018
    tally.figure = "0 settings changed unseen"


def test_every_input_is_in_the_fingerprint(harness, tally, tmp_path):
    """T6 one byte of each input flipped: refused, the input named; a file touched or moved: nothing"""
    import importlib
    import shutil
    from pathlib import Path

    from lmkit.stage import inputs_of

    for stage in CHAIN:
        cls = config_class(importlib.import_module(stage))
        config = cls.model_validate(read_mapping(harness.folder / "configs" / f"{stage}.yaml"))
        reference = Stage(stage, config).fingerprint
        for number, (field, value) in enumerate(inputs_of(config).items()):
            path = Path(str(value))
            if not path.exists():
                continue  # module:function
            copy = tmp_path / f"{stage}{number}" / path.name
            copy.parent.mkdir()
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
            if path.is_dir():
                (copy / "MANIFEST.json").unlink()  # a folder from outside
            moved = Stage(stage, config.model_copy(update={field: type(value)(copy)})).fingerprint
            target = max((p for p in [copy, *copy.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size)
            data = bytearray(target.read_bytes())
            data[len(data) // 2] ^= 1
            target.write_bytes(data)
            edited = Stage(stage, config.model_copy(update={field: type(value)(copy)})).fingerprint
            assert tally.count(edited != moved), f"{stage}.{field}: a changed byte is not seen"
            if path.is_file():
                assert tally.count(moved == reference), f"{stage}.{field}: its place is in the fingerprint"
    tally.figure = "by content, not by name or time"


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("pretrain", ["--train.learning_rate", 0.5], "learning_rate"),
        ("pretrain", ["--seed", 3], "seed: 0, now 3"),
        ("sft", ["--train.per_device_train_batch_size", 2], "per_device_train_batch_size"),
        ("ppo", ["--train.rollout_batch_size", 16], "rollout_batch_size"),
    ],
)
def test_resuming_with_other_settings_is_refused(harness, tally, everything, stage, flags, said):
    """T6 a stopped stage, gone on with another setting"""
    if not everything and said != "learning_rate":
        pytest.skip("a sample: FAULTS=all tries each")
    directory = harness.fresh(stage)
    assert harness.run(stage, directory, hook=StopAfter(2))[0] == 75
    code, output = harness.run(stage, directory, *flags)
    assert tally.count(code == 2 and said in output), output
    tally.figure = "exit 2, the field named"
