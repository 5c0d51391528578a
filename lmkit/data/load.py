"""What a stage asks for, from where it lies: rows of one source in TRL's columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lmkit.data.formats import to_preferences, to_prompt_completion, to_prompts
from lmkit.data.sources import load_rows

Sources = str | Path | list[str]


def load_demonstrations(source: Sources, mapping: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `prompt` and `completion`."""
    return to_prompt_completion(load_rows(source), mapping, str(source))


def load_pairs(source: Sources, mapping: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `prompt`, `chosen` and `rejected`."""
    return to_preferences(load_rows(source), mapping, str(source))


def load_prompts(source: Sources, mapping: Mapping[str, str] | None = None) -> Dataset:
    """Rows of `prompt`."""
    return to_prompts(load_rows(source), mapping, str(source))


def check_rows(stage: str, config: Any) -> None:
    """Reads the rows that a stage's configuration names, so that a chain refuses them before its first stage starts."""
    readers = {
        "sft": {"data": load_demonstrations, "eval_data": load_demonstrations},
        "preferences": {"data": load_pairs} if getattr(config, "data", None) else {"prompts": load_prompts},
        "ppo": {"prompts": load_prompts, "eval_prompts": load_prompts},
        "evaluation": {"prompts": load_prompts},
    }
    for field, read in readers.get(stage, {}).items():
        if (value := getattr(config, field)) is not None:
            read(value, config.mapping if field.endswith("data") else None)
