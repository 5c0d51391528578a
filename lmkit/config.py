"""Configurations: typed, filled from YAML files and dotted flags, with every mistake reported at once.

    python recipes/pretrain.py --config my.yaml --train.learning_rate 1e-3

A configuration is a pydantic model. Values come from, in rising order: the class's defaults, the file, the flags.
A nested section or mapping is merged key by key: a flag that sets one key of `train` leaves the others as they were.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmkit.errors import BadInput
from lmkit.strict_yaml import dump_yaml, parse_yaml, read_mapping


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def setting(default: Any, description: str, **constraints: Any) -> Any:
    """A field that decides the result, with one line for `--help`."""
    return Field(default, description=description, **constraints)


def knob(default: Any, description: str, **constraints: Any) -> Any:
    """A field that does not decide the result: where to write, how often to log, how many workers."""
    return Field(default, description=description, json_schema_extra={"knob": True}, **constraints)


def source(default: Any, description: str, **constraints: Any) -> Any:
    """A field that names an input: a path, whose content decides the result, or `module:function`."""
    return Field(default, description=description, json_schema_extra={"source": True}, **constraints)


class StageConfig(Config):
    """Fields every stage has."""

    output_dir: Path = knob(..., "where the stage writes: artifact folders, record, metrics, checkpoints")
    seed: int = setting(0, "seed of every random choice the stage makes")
    report_to: list[str] = knob([], "trackers beside metrics.jsonl: tensorboard, trackio, wandb")


def parse_flags(argv: list[str], switches: set[str] = frozenset()) -> dict[str, Any]:
    """Flags as a nested mapping; values are YAML scalars or flow collections. A flag in `switches` may stand without.

    >>> parse_flags(["--train.learning_rate", "1e-3", "--seed=2", "--dry-run"], {"dry_run"})
    {'train': {'learning_rate': 0.001}, 'seed': 2, 'dry_run': True}
    """
    mapping: dict[str, Any] = {}
    words = list(reversed(argv))
    while words:
        word = words.pop()
        flag, equals, text = word.partition("=")
        if not flag.startswith("--") or not flag[2:]:
            raise BadInput(f"{word!r} is not a flag. Flags are --name value or --section.name value.")
        *sections, key = flag[2:].replace("-", "_").split(".")
        if not equals and key in switches and not sections and (not words or words[-1].startswith("--")):
            text = "true"
        elif not equals and not words:
            raise BadInput(f"{flag} needs a value, as in `{flag} VALUE`.")
        elif not equals:
            text = words.pop()
        inner = mapping
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise BadInput(f"{flag} sets a key inside {section}, which another flag has set to a single value.")
        inner[key] = parse_yaml(text, flag)
    return mapping


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, mappings merged key by key.

    >>> merge({"train": {"max_steps": 10, "seed": 0}}, {"train": {"max_steps": 20}})
    {'train': {'max_steps': 20, 'seed': 0}}
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def defaults(cls: type[Config]) -> dict[str, Any]:
    """A class's default values as a nested mapping; required fields are absent."""
    fields = {field.alias or name: field for name, field in cls.model_fields.items() if not field.is_required()}
    given = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: value.model_dump() if isinstance(value, Config) else value for name, value in given.items()}


def validate(cls: type[Config], mapping: dict[str, Any], source: str = "the configuration") -> Any:
    """An instance of `cls` from defaults and `mapping`; BadInput lists every mistake, a line each."""
    try:
        return cls.model_validate(merge(defaults(cls), mapping))
    except ValidationError as error:
        lines = [line for e in error.errors() for line in _describe(cls, e)]
        raise BadInput("\n".join([f"{source} has {len(lines)} mistake{'s' * (len(lines) > 1)}:", *lines])) from None


def load(cls: type[Config], argv: list[str]) -> Any:
    """The configuration of a recipe from its command line: `--config FILE` and dotted flags."""
    flags = parse_flags(argv, {name for name, field in cls.model_fields.items() if field.annotation is bool})
    path = flags.pop("config", None)
    mapping = read_mapping(Path(path)) if path is not None else {}
    return validate(cls, merge(mapping, flags), source=f"{path} with the flags" if path else "the command line")


def explain(cls: type[Config], values: Any = None, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, default, description) of every field, sections opened."""
    rows = []
    for name, field in cls.model_fields.items():
        value = getattr(values, name) if values else field.get_default(call_default_factory=True)
        if isinstance(value, Config):
            rows += explain(type(value), value, f"{prefix}{name}.")
        else:
            name = field.alias or name
            shown = str(value).replace("\n", "\\n")
            rows.append((prefix + name, "required" if field.is_required() else shown, field.description or ""))
    return rows


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def _describe(cls: type[Config], error: Any) -> list[str]:
    """One pydantic error as a line: where, what was found, what was wanted."""
    *sections, key = [str(part) for part in error["loc"]] or [""]
    where = ".".join([*sections, key]).rstrip(".")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        shown = "" if error["type"] in ("missing", "value_error") else f" (found {error['input']!r})"
        # A check of a whole section lists its own lines, each with the full name it found wrong.
        return [f"  {line}" if where == "" else f"  {where}  {line}{shown}" for line in message.split("\n")]
    names = [name for name, _, _ in explain(cls)]
    siblings = [n.removeprefix(".".join([*sections, ""])) for n in names if n.startswith(".".join([*sections, ""]))]
    near = difflib.get_close_matches(key, siblings, 1) or difflib.get_close_matches(key, names, 1, 0.7)
    # A known name in the wrong section is as common as a typing error.
    near = near or [n for n in names if n.split(".")[-1] == key]
    hint = f"Did you mean {near[0]}?" if near else f"Options here: {', '.join(siblings)}."
    return [f"  {where}  unknown option. {hint}"]
