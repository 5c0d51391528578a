"""What a run was made with: versions, commit and hardware, recorded but never hashed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmkit.processes import num_asked


def peak_memory_bytes() -> int:
    """The most memory the process held: on the GPU when one was used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, recorded but never hashed."""
    packages = ["lmkit", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers"]
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    torch = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else platform.machine()
    hardware = {"device": device, "cpus": os.cpu_count(), "processes": num_asked()}
    return {"versions": versions, "git_commit": git.stdout.strip() or None, "hardware": hardware}
