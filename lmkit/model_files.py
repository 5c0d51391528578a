"""What a model or tokenizer directory may hold: settings and safetensors, nothing that would run.

transformers loads kernels from the Hub when a configuration names one, whatever the caller asks for, and offers to run
the code that `auto_map` names. So the files are looked through before any of them is given to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lmkit.errors import BadInput

# Keys whose value would be fetched and run.
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines", "trust_remote_code")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def check_model_files(folder: Path) -> None:
    """BadInput when a directory asks to run code, names a kernel or a file outside, or has its weights as pickles.

    Tokenizer directories, which have no weights, may be given too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a model directory. Check the path: nothing is looked up on the Hub by it.")
    for path in sorted(folder.rglob("*.json")):
        if "config" in path.name or path.name.endswith(".index.json"):
            for key, value in _entries(_read(path), path):
                _check_entry(key, value, path)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} has its weights as {pickles[0]}, a pickle, which can run code when it is read. Load it where "
            "you trust it and save it again: model.save_pretrained writes safetensors."
        )
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is damaged or no safetensors file ({error}). Fetch or make it again.") from None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON ({error}). Fetch or make it again.") from None


def _entries(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of all mappings inside a JSON value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _check_entry(key: str, value: Any, path: Path) -> None:
    if key in CODE_KEYS and value:
        raise BadInput(f"{path} asks to run code of its own ({key}), which lmkit does not do. Remove the key.")
    names = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else []
    if ("attn_implementation" in key or "kernel_config" in key) and any("/" in str(n) or ":" in str(n) for n in names):
        raise BadInput(f"{path} names a kernel to fetch and run ({key}: {str(value)[:80]}). Remove the key.")
    if key == "weight_map" and (outside := [name for name in names if Path(str(name)).name != name]):
        raise BadInput(f"{path} names weights outside its folder ({str(outside[0])[:80]!r}). Fetch the model again.")
