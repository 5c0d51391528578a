"""What a stage asks for, from where it lies: rows of one source in TRL's columns."""

from collections.abc import Mapping
from pathlib import Path

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
