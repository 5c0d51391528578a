"""Checks a `train:` section against the fields of the Hugging Face class it is passed to, without importing it.

Importing TRL costs seconds, and a misspelt key should be answered at once. The field names and types of `SFTConfig` and
`RewardConfig` are read from the source files of the installed packages.
"""

import ast
import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

# Fields the stage itself sets, and where the same thing is asked for.
SET_BY_STAGE = {
    "output_dir": "--output_dir",
    "seed": "--seed",
    "report_to": "--report_to",
    "max_length": "--max_length",
    "truncation_mode": "--on_truncation",
    "assistant_only_loss": "--assistant_only_loss",
    "completion_only_loss": "nothing: a prompt is never learnt",
    "chat_template_path": "nothing: the model directory's own template is used",
    "model_init_kwargs": "--model",
    "resume_from_checkpoint": "running the same command again, which resumes",
    "disable_tqdm": "nothing: progress is always shown",
    "logging_nan_inf_filter": "nothing: a non-finite loss always stops the run",
    "save_total_limit": "nothing: the two newest checkpoints are kept",
    "load_best_model_at_end": "nothing: the last model is the result",
    "save_only_model": "nothing: a checkpoint always holds the optimizer",
    "push_to_hub": "`hf upload` of the finished model directory",
}
UNREAD_BY_MUON = ("optim", "optim_args", "optim_target_modules", "adam_epsilon")
SOURCES = {
    "SFTConfig": ("trl/trainer/sft_config.py", "trl/trainer/base_config.py", "transformers/training_args.py"),
    "RewardConfig": ("trl/trainer/reward_config.py", "trl/trainer/base_config.py", "transformers/training_args.py"),
}


def check_train_block(
    mapping: dict[str, Any], class_name: Literal["SFTConfig", "RewardConfig"], muon: bool = False
) -> dict[str, Any]:
    """`mapping` with values converted to the types of the class's fields. muon: whether matrices learn by Muon.

    Raises ValueError listing every unknown key (with the near name), wrong type, and key that the stage sets itself or
    that Muon leaves unread.

    >>> check_train_block({"max_steps": 300, "learning_rate": "1e-3"}, "SFTConfig")
    {'max_steps': 300, 'learning_rate': 0.001}
    >>> check_train_block({"learning_rte": 1e-3}, "SFTConfig")
    Traceback (most recent call last):
        ...
    ValueError: learning_rte: unknown option of SFTConfig. Did you mean learning_rate?
    """
    if not mapping:
        return {}
    types, checked, mistakes = field_types(class_name), {}, []
    for key, value in mapping.items():
        if key in SET_BY_STAGE:
            mistakes.append(f"{key}: is set by the stage; remove it. Instead: {SET_BY_STAGE[key]}.")
        elif muon and key in UNREAD_BY_MUON:
            mistakes.append(f"{key} {value}: not read, since matrices learn by Muon. Set muon false")
        elif key == "num_train_epochs" and class_name == "SFTConfig" and mapping.get("max_steps", -1) > 0:
            mistakes.append(f"{key} {value}: not read beside max_steps {mapping['max_steps']}. Set max_steps -1")
        elif key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"Did you mean {near[0]}?" if near else "Its documentation lists the options."
            mistakes.append(f"{key}: unknown option of {class_name}. {hint}")
        else:
            try:
                checked[key] = TypeAdapter(types[key]).validate_python(value)
            except ValidationError as error:
                mistakes.append(f"{key}: {error.errors()[0]['msg']} (found {value!r})")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return checked


@functools.cache
def field_types(class_name: str) -> dict[str, Any]:
    """Name -> type of every field of `SFTConfig` or `RewardConfig`; a type that cannot be checked is `Any`."""
    names = _Names(Any=Any, Literal=Literal, **_choices())
    fields = {}
    for source in reversed(SOURCES[class_name]):
        classes = (node for node in _parse(source).body if isinstance(node, ast.ClassDef))
        wanted = (node for node in classes if node.name in (class_name, "_BaseConfig", "TrainingArguments"))
        for node in (statement for cls in wanted for statement in cls.body if isinstance(statement, ast.AnnAssign)):
            text = ast.unparse(node.annotation)
            choice = text.removesuffix(" | str")
            # `SchedulerType | str` means one of the values, written as text.
            fields[node.target.id] = eval(choice if choice in names else text, {}, names)
    return fields


class _Names(dict):
    def __missing__(self, name: str) -> Any:
        builtin = __builtins__.get(name) if isinstance(__builtins__, dict) else getattr(__builtins__, name, None)
        return Any if builtin is None else builtin


def _choices() -> dict[str, Any]:
    """The string enumerations of transformers' training arguments as literals of their values."""
    choices = {}
    for source in ("transformers/training_args.py", "transformers/trainer_utils.py"):
        for node in _parse(source).body:
            if isinstance(node, ast.ClassDef) and "ExplicitEnum" in map(ast.unparse, node.bases):
                values = [ast.literal_eval(s.value) for s in node.body if isinstance(s, ast.Assign)]
                choices[node.name] = Literal[tuple(values)]
    return choices


def _parse(source: str) -> ast.Module:
    package, _, rest = source.partition("/")
    folder = Path(importlib.util.find_spec(package).origin).parent
    return ast.parse((folder / rest).read_text(encoding="utf-8"))
