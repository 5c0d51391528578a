"""From `python recipes/pretrain.py` to its first update: seconds and memory over 10 MB and over 1 GB of shards.

    python benchmarks/startup.py                       # 5 runs of each size in turn, about 2 minutes
    python benchmarks/startup.py --mb 10 100 --reps 1  # to see that it runs

The recipe as it is, in a process of its own for each run, stopped after one update of the tiny preset. The shards are
the tales again and again, sealed as the tokenizer stage seals them, and warm in the page cache. Of the larger corpus
the bytes are compared with the manifest in a thread meanwhile: `compared_seconds` is when that was done. `cpu_seconds`,
of all threads up to the first update, have a part of it; `main_cpu_seconds` are those of the main thread alone, which
is what is waited for where a second core is free.

Medians, and `startup_ratio`: of the largest over the smallest.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(folder: Path, sizes: list[int]) -> None:
    """A tokenizer, and for each size in MB a sealed folder of shards with that many bytes of training tokens."""
    import numpy as np

    from lmkit.artifact import seal
    from lmkit.data.shards import write_shards
    from lmkit.tokenization.train import train_tokenizer

    text = gzip.decompress((ROOT / "data/tales/text.validation.txt.gz").read_bytes()).decode()
    documents = text.split("\n\n")
    tokenizer = train_tokenizer(lambda: documents, vocab_size=1024)
    with seal(folder / "tokenizer") as sealed:
        tokenizer.save_pretrained(sealed)
    for size in sizes:
        with seal(folder / str(size)) as sealed:
            write_shards(documents, tokenizer, sealed / "validation")
            part = write_shards(documents, tokenizer, sealed / "train")
            times = -(-size * 10**6 // part.tokens.nbytes)
            tokens, offsets = np.array(part.tokens), np.array(part.document_offsets)
            with (sealed / "train" / "tokens.bin").open("wb") as file:
                for _ in range(times):
                    tokens.tofile(file)
            starts = [offsets[:-1] + len(tokens) * number for number in range(times)]
            np.concatenate([*starts, [len(tokens) * times]]).tofile(sealed / "train" / "documents.bin")
            meta = part.meta | {name: part.meta[name] * times for name in ("num_tokens", "num_documents", "num_bytes")}
            (sealed / "train" / "meta.json").write_text(json.dumps(meta))


def start(begun: float) -> None:
    """The recipe, in this process, up to its first update."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import pretrain

    from lmkit.artifact import check_inputs
    from lmkit.config import load
    from lmkit.stage import Stage

    def first_update_done(stage: Stage) -> None:
        found = {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time()}
        found["main_cpu_seconds"] = time.thread_time()
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        check_inputs()
        print(json.dumps(found | {"compared_seconds": time.monotonic() - begun}), flush=True)
        os._exit(0)

    Stage.stop_requested = first_update_done
    pretrain.main(load(pretrain.PretrainConfig, sys.argv[1:]))


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make(folder, args.mb)
        rows: dict[int, list[dict]] = {size: [] for size in args.mb}
        for number in range(args.reps + 1):
            for size, found in rows.items():
                flags = ["--tokenizer", folder / "tokenizer", "--shards", folder / str(size)]
                flags += ["--packing", args.packing, "--output_dir", folder / f"run{number}-{size}"]
                command = [sys.executable, __file__, *map(str, flags)]
                begun = {"LMKIT_STARTUP_BEGUN": str(time.monotonic())}
                done = subprocess.run(command, env=os.environ | begun, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
                if number:  # the first run warms the page cache
                    found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        size: {key: statistics.median(r[key] for r in found) for key in found[0]} for size, found in rows.items()
    }
    for size, found in medians.items():
        spread = [round(f(row["seconds"] for row in rows[size]), 2) for f in (min, max)]
        value = {key: round(number, 2) for key, number in found.items()}
        emit(f"startup_{size}mb", value, "", runs=args.reps, seconds_from_to=spread, packing=args.packing)
    small, large = medians[min(args.mb)], medians[max(args.mb)]
    emit("startup_ratio", {key: round(large[key] / small[key], 3) for key in small}, "x", packing=args.packing)


def emit(name: str, value: object, unit: str, **config: object) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit, "config": config}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[10, 1000], help="megabytes of training tokens")
    parser.add_argument("--reps", type=int, default=5, help="runs of each size that count")
    parser.add_argument("--packing", default="stream", help="of the recipe")
    parser.add_argument("--folder", default=None, help="where the shards are made; empty: the temporary folder")
    compare(parser.parse_args())


if __name__ == "__main__":
    begun = os.environ.get("LMKIT_STARTUP_BEGUN")
    start(float(begun)) if begun else main()
