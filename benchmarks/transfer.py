"""What a trained body is worth: fine-tuning beside training from nothing, over seeds, with paired intervals.

    python recipes/vision/classify.py --data CIFAR ... --output_dir runs/cifar      # docs/vision.md has the flags
    python benchmarks/transfer.py runs/cifar/model ../shared/data/images/ants_bees  # each way, all images
    python benchmarks/transfer.py runs/mnist/model builtin:digits --limit 3         # 3 images a class
    python benchmarks/transfer.py runs/cifar/model ../shared/data/images/ants_bees --choose  # learning rates

Every way sees the same images in the same number of updates; a way's learning rate is given with it below. One JSON
line a run, then one a comparison with scratch: the mean difference in accuracy and its 95 % interval by Student's t.
With --choose each way is tried at several rates on other seeds, and judged on a part of train: the test stays unseen.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from lmkit.config import load
from lmkit.stage import read_record
from lmkit.vision.data import read_images
from lmkit.vision.options import Preprocess

sys.path.insert(0, str(Path(__file__).parents[1]))
from recipes.vision.classify import ClassifyConfig, main

RATES = {"scratch": 5e-3, "full": 1e-3, "gradual": 2e-3, "lora": 5e-3, "frozen": 2e-2}


def framed_digits(folder: Path) -> Path:
    """The built-in digits with a black frame of a quarter of their side: as large in their picture as MNIST's are."""
    arrays = {}
    for split, examples in read_images("builtin:digits").items():
        arrays[f"x_{split}"] = np.stack([np.pad(example.image, 2) for example in examples])
        arrays[f"y_{split}"] = np.array([int(example.label) for example in examples])
    np.savez(folder / "digits.npz", **arrays)
    return folder / "digits.npz"


def accuracy(way: str, seed: int, args: argparse.Namespace, data: Path, folder: Path, rate: float) -> float:
    """Test accuracy of one run of the recipe."""
    out = folder / f"{way}-{seed}-{rate:g}"
    flags = {"data": data, "output_dir": out, "seed": seed, "train.learning_rate": rate}
    flags |= {"train.num_train_epochs": args.epochs, "train.per_device_train_batch_size": args.batch}
    flags |= {"augment.flip": str(args.flip).lower(), "augment.shift": args.shift}
    # A number of evaluations that takes no time; the last one is at the end.
    flags |= {"train.eval_steps": 10**6, "train.save_steps": 10**6}
    if args.limit is not None:
        flags["limit"] = args.limit
    if way == "scratch":
        seen = Preprocess.load(args.body)
        flags |= {"preprocess.size": seen.size, "preprocess.channels": seen.channels, "preprocess.resize": seen.resize}
    else:
        flags |= {"init_from": args.body, "mode": way}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        main(load(ClassifyConfig, words))
    return read_record(out)["metrics"]["test/accuracy"]


def compare_rates(rates: dict[str, float], args: argparse.Namespace, train: Path, folder: Path, config: dict) -> None:
    """One line for each way and rate: the mean accuracy on a fifth of `train`, another one for each seed from 10 on."""
    for way, middle in rates.items():
        for rate in (middle / 3, middle, middle * 3):
            found = [accuracy(way, 10 + seed, args, train, folder, rate) for seed in range(args.seeds)]
            emit(f"accuracy_{way}", statistics.mean(found), learning_rate=round(rate, 6), **config)


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences."""
    half = student.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("body", type=Path, help="directory of a classifier")
    parser.add_argument("data", help="images with labels, of other classes; builtin:digits are framed")
    parser.add_argument("--ways", default=",".join(RATES), help="names with commas between; scratch is always run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="training images of each class, drawn by the seed; all")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shift", type=float, default=0.125)
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--rates", default="", help="other learning rates, as in scratch=2e-3,full=3e-3")
    parser.add_argument("--choose", action="store_true", help="compare learning rates, on train alone")
    args = parser.parse_args()
    if args.choose and not (Path(args.data) / "train").is_dir():
        parser.error("--choose: wanted a folder with a folder train, of which a part can judge")
    if args.seeds < 2:
        parser.error("--seeds: an interval needs 2 or more")
    rates = RATES | {way: float(rate) for way, rate in (word.split("=") for word in args.rates.split(",") if word)}
    ways = ["scratch", *(way for way in args.ways.split(",") if way != "scratch")]
    found: dict[str, list[float]] = {way: [] for way in ways}
    config = {key: str(value) for key, value in vars(args).items() if key != "ways"}
    with tempfile.TemporaryDirectory() as name:
        data = framed_digits(Path(name)) if args.data == "builtin:digits" else Path(args.data)
        if args.choose:
            return compare_rates({way: rates[way] for way in ways}, args, data / "train", Path(name), config)
        for seed in range(args.seeds):
            for way in ways:
                found[way].append(accuracy(way, seed, args, data, Path(name), rates[way]))
                emit(f"accuracy_{way}", found[way][-1], seed=seed, **config)
    for way in ways[1:]:
        gains = [one - other for one, other in zip(found[way], found["scratch"])]
        low, high = interval(gains)
        emit(f"gain_{way}", statistics.mean(gains), low=round(low, 4), high=round(high, 4), **config)


def emit(name, value, **config):
    print(json.dumps({"name": name, "value": round(value, 4), "unit": "share", "config": config}), flush=True)


if __name__ == "__main__":
    run()
