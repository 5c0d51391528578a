"""Images per second of each network in training, in float32 and as the recipes run it: one JSON line each.

    python benchmarks/vision.py                                       # all networks, about 2 minutes
    python benchmarks/vision.py --only resnet18_narrow,cifar --reps 1

`probe` is what `mixed_precision` of the training loop chooses for this machine (bfloat16 where it has the
instructions) with the convolutions' channels last; `fp32` is neither. The two take turns in one process (A B A B ...),
after one round that is not counted. A round is forward and backward of one batch of random images at the size the
network was published with; speeds are medians, `probe_vs_fp32` a ratio of medians, of wall and of CPU seconds.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from lmkit.training.loop import CPU_BF16_WIDTH, mixed_precision
from lmkit.vision.cnn import NETWORKS

SHAPES = {  # channels, side, images a batch
    **{"resnet18_narrow": (3, 32, 64), "threeconv": (3, 48, 64), "cifar": (3, 32, 128)},
    **{name: (1, 28, 256) for name in ("lenet", "bn_lenet", "softmax_regression", "mlp", "mlp_dropout")},
    **{name: (1, 224, 4) for name in ("alexnet", "vgg11", "vgg11_quarter", "nin")},
    **{name: (1, 96, 8) for name in ("googlenet", "resnet18")},
}


def sides(name: str, device: str) -> dict[str, object]:
    """Name -> a function that takes one batch forward and backward."""
    channels, side, batch = SHAPES[name]
    torch.manual_seed(0)
    network = NETWORKS[name](channels, side, 10).to(device).train()
    images, labels = torch.randn(batch, channels, side, side, device=device), torch.arange(batch, device=device) % 10
    low = mixed_precision(None, CPU_BF16_WIDTH) == "bf16"

    def step(network: nn.Module, images: torch.Tensor, low: bool) -> None:
        network.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()

    last = NETWORKS[name](channels, side, 10).to(device).train().to(memory_format=torch.channels_last)
    turned = images.to(memory_format=torch.channels_last)
    return {"fp32": lambda: step(network, images, False), "probe": lambda: step(last, turned, low)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--only", default="", help="names of networks, with commas between")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name] or list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"--only: {', '.join(unknown)} is not known; wanted some of {', '.join(SHAPES)}")
    config = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "reps": args.reps}
    config["precision"] = mixed_precision(None, CPU_BF16_WIDTH)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    for name in names:
        seconds = {(clock, side): [] for clock in clocks for side in ("fp32", "probe")}
        runs = sides(name, args.device)
        for round_ in range(-1, args.reps):
            for side, run in runs.items():
                started = {clock: read() for clock, read in clocks.items()}
                run()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 0:
                    for clock, read in clocks.items():
                        seconds[clock, side].append(read() - started[clock])
        channels, side, batch = SHAPES[name]
        shape = {"network": name, "images": f"{channels}x{side}x{side}", "batch": batch}
        medians = {key: statistics.median(taken) for key, taken in seconds.items()}
        for way in runs:
            emit(f"images_{way}", batch / medians["wall", way], "images/s", **shape, **config)
        for clock in clocks:
            emit(f"probe_vs_fp32_{clock}", medians[clock, "fp32"] / medians[clock, "probe"], "times", **shape, **config)


def emit(name, value, unit, **config):
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "config": config}), flush=True)


if __name__ == "__main__":
    main()
