"""What sealing costs: its seconds as a share of each stage of a finished run; one JSON line a stage.

    python benchmarks/sealing.py runs/tiny

The newest checkpoint and the artifacts of each stage are copied and sealed anew, beside the run so that the disk is the
same; what is timed is what sealing adds to writing the files: chmod, fsync, sha256, manifest, rename, and looking the
checkpoint before through before the one before that is deleted. Reading the inputs' hashes at the start is counted too.
The share is `sealing_seconds / seconds`; the goal is at most 0.03.
"""

import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lmkit.artifact import MANIFEST, seal, verify
from lmkit.rounds import CHAIN
from lmkit.stage import read_record, rotate
from lmkit.tracking import read_jsonl

REPEATS = 5


def seconds_to_seal(source: Path, scratch: Path) -> float:
    """Median seconds of sealing a copy of `source` as one more checkpoint of a folder that keeps two."""
    seconds = []
    for step in range(REPEATS + 2):
        with seal(scratch / f"step-{step:06d}") as folder:
            for path in source.rglob("*"):
                if path.is_file() and path.name != MANIFEST:
                    (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, folder / path.relative_to(source))
            started = time.perf_counter()
        rotate(scratch)
        seconds.append(time.perf_counter() - started)
    shutil.rmtree(scratch)
    return statistics.median(seconds[2:])  # the first two have nothing to look through


def seconds_to_verify(paths: list[Path]) -> float:
    started = time.perf_counter()
    for path in paths:
        verify(path)
    return time.perf_counter() - started


def measure(run: Path, stage: str) -> dict:
    """The line of one stage."""
    record, directory = read_record(run / stage), run / stage
    inputs = [Path(entry["path"]) for entry in record["inputs"].values()]
    inputs = [path for path in inputs if (path / MANIFEST).is_file()]
    checkpoints = sorted((directory / "checkpoints").glob("step-*"))
    num_saves = 0
    if checkpoints:
        last = read_jsonl(directory / "metrics.jsonl")[-1]["step"]
        num_saves = math.ceil(last / record["full_config"]["train"]["save_steps"])
    with tempfile.TemporaryDirectory(dir=run.parent) as scratch:
        folder = Path(scratch) / "checkpoints"
        each = seconds_to_seal(checkpoints[-1], folder) if checkpoints else 0.0
        once = sum(seconds_to_seal(directory / name, folder) for name in record["artifacts"])
    total = num_saves * each + once + seconds_to_verify(inputs)
    return {
        "stage": stage,
        "seconds": record["seconds"],
        "num_saves": num_saves,
        "checkpoint_bytes": sum(p.stat().st_size for p in checkpoints[-1].iterdir()) if checkpoints else 0,
        "seconds_a_save": round(each, 4),
        "sealing_seconds": round(total, 3),
        "share": round(total / record["seconds"], 4),
    }


if __name__ == "__main__":
    run = Path(sys.argv[1])
    for stage in CHAIN:
        if read_record(run / stage) is not None:
            print(json.dumps(measure(run, stage)), flush=True)
