"""Time and memory of a training step on many devices, predicted from one number measured on one of them.

    python benchmarks/scaling.py                 # the model beside published runs: JSON lines, and what is off
    python benchmarks/scaling.py --tables        # the tables of docs/scaling.md
    python benchmarks/scaling.py --measure       # lmkit here: 2 processes on 2 cores over 1 on 1, on an idle machine

The model, all of it:

    compute        tokens x FLOP a token x recomputation / (peak x efficiency)
    communication  bytes a device sends or receives / (bandwidth x 0.8)
    step           the longer of the two, and the share of one block of the communication, which nothing hides

`efficiency` is what was measured: FLOP/s over the peak, of a compiled step on one device (lmkit logs it as `mfu`).
FLOP a token are 6 a matrix weight and 12 H D T a layer (`lmkit.training.mfu`); recomputation is 1, 7/6 where half of
the forward is made again, 4/3 where all of it is. N parameters cross as follows, in one micro-batch:

    ddp    an all-reduce of float32 gradients: 2 (n-1)/n 4 N, once an update
    fsdp2  gathered in bfloat16 for forward and backward, scattered in float32: (n-1)/n (2 + 2 + 4) N
    hsdp   the same inside a machine, and between m machines an all-reduce of each share: 2 (m-1)/m 4 N / n
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

GIB, ACHIEVABLE = 2**30, 0.8  # of a link's bandwidth, in large messages
RECOMPUTED = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}


@dataclass(frozen=True)
class Shape:
    """A decoder. matrices: of the feed-forward part, 3 where it is gated. attended: share of the context that a token's
    attention reaches, where layers have windows. outer: embedding tables beside the input's and the output's."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    matrices: int = 3
    attended: float = 1.0
    tied: bool = False

    @property
    def block(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.matrices * self.width * self.intermediate

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.layers * self.block + (1 if self.tied else 2) * self.head

    def flops_per_token(self, context: int) -> float:
        """Forward and backward, without recomputation."""
        attention = 12 * self.layers * self.heads * self.head_dim * context * self.attended
        return 6 * (self.layers * self.block + self.head) + attention

    def activation_bytes(self) -> int:
        """Bytes a token leaves in a block for the backward, in bfloat16: inputs of products, norms and attention."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return 2 * (4 * self.width + attention + (self.matrices + 1) * self.intermediate)


@dataclass(frozen=True)
class Device:
    """peak: FLOP/s in bfloat16; link, network: bytes/s of a device inside a machine and between machines."""

    peak: float
    memory: float
    link: float
    network: float
    per_machine: int = 8


@dataclass(frozen=True)
class Run:
    """rows: of `context` tokens that a device takes at once, `accumulation` times an update. logit_bytes: a token and
    word of the vocabulary; 0 where logits never exist at once."""

    shape: Shape
    devices: int
    mode: str  # ddp, fsdp2 or hsdp
    context: int
    rows: int
    accumulation: int = 1
    recompute: str = "none"
    logit_bytes: int = 0


H100 = Device(peak=989e12, memory=80e9, link=450e9, network=50e9)
H200 = replace(H100, memory=141e9)
A100 = Device(peak=312e12, memory=80e9, link=300e9, network=25e9)

LLAMA_8B = Shape(32, 4096, 32, 8, 128, 14336, 128256)
# nanochat: width 64 x depth, 4 x width inside without a gate, three of four layers see half of the context.
NANOCHAT_D24 = Shape(24, 1536, 12, 12, 128, 6144, 32768, matrices=2, attended=0.625)
NANOCHAT_D26 = replace(NANOCHAT_D24, layers=26, width=1664, heads=13, intermediate=6656)


def step_seconds(run: Run, device: Device, efficiency: float) -> dict[str, float]:
    """Seconds of an update in parts, and tokens a second and device."""
    tokens = run.rows * run.context * run.accumulation
    flops = tokens * run.shape.flops_per_token(run.context) * RECOMPUTED[run.recompute]
    compute = flops / (device.peak * efficiency)
    size, machines = run.shape.parameters, -(-run.devices // device.per_machine)
    inside, between = device.link * ACHIEVABLE, (device.link if machines == 1 else device.network) * ACHIEVABLE
    if run.mode == "ddp":
        communication = 2 * (run.devices - 1) / run.devices * 4 * size / between
    elif run.mode == "fsdp2":
        communication = run.accumulation * (run.devices - 1) / run.devices * 8 * size / between
    else:
        shares = min(run.devices, device.per_machine)
        communication = run.accumulation * (shares - 1) / shares * 8 * size / inside
        communication += 2 * (machines - 1) / machines * 4 * size / shares / between
    step = max(compute, communication) + communication / run.shape.layers
    return {
        "compute_seconds": compute,
        "communication_seconds": communication,
        "step_seconds": step,
        "tokens_per_second_per_device": tokens / step,
    }


def memory_bytes(run: Run, device: Device) -> dict[str, float]:
    """Bytes of one device at the end of the forward, in parts; AdamW in float32, products in bfloat16."""
    shape, tokens = run.shape, run.rows * run.context
    shares = {"ddp": 1, "fsdp2": run.devices, "hsdp": min(run.devices, device.per_machine)}[run.mode]
    whole = run.mode == "ddp"
    kept = {"none": 1.0, "selective": 0.5, "full": 0.0}[run.recompute]
    inputs = 2 * shape.width * shape.layers + (1 - kept) * shape.activation_bytes()  # and one block made again
    return {
        "states": 16 * shape.parameters / shares,
        "copies": 2 * shape.parameters if whole else 2 * (2 * shape.block + shape.head),
        "activations": tokens * (kept * shape.layers * shape.activation_bytes() + (inputs if kept < 0.5 else 0)),
        "logits": tokens * shape.vocabulary * run.logit_bytes,
    }


# ------------------------------------------------------------------------------------------------ published runs

TORCHTITAN = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md @ 31a17bf, tables 1 and 3"
NANOCHAT_BOARD = "karpathy/nanochat dev/LEADERBOARD.md @ 00932d1, run 1"
NANOCHAT_LOG = "karpathy/nanochat dev/LOG.md @ 437943b, 2026-02-02"
# Run 1 in one number: 4.330784e19 FLOP (by nanochat's own count) in 10949.47 s on eight H100.
EFFICIENCY = 4.330784131228946e19 / 10949.46713 / 8 / H100.peak
# logits in bfloat16, their float32 copy, its gradient; selective recomputation as in its llama3_8b.toml @ 01424cb
TITAN = Run(LLAMA_8B, 8, "fsdp2", context=8192, rows=2, recompute="selective", logit_bytes=10)
PUBLISHED = [
    ("nanochat d26, 8 x H100, bf16", NANOCHAT_LOG, Run(NANOCHAT_D26, 8, "ddp", 2048, 16, 2), 630e3 / 8, None),
    ("torchtitan 8B, 8 x H100, compiled", TORCHTITAN, TITAN, 6667, 77.0),
    ("torchtitan 8B, 128 x H100, compiled", TORCHTITAN, replace(TITAN, devices=128), 6514, 62.0),
]


def compare() -> list[dict]:
    """One row a published figure: predicted, published, and how far off."""
    rows = []
    for name, source, run, speed, memory in PUBLISHED:
        found = step_seconds(run, H100, EFFICIENCY)["tokens_per_second_per_device"]
        rows.append({"metric": f"{name}: tokens/s/GPU", "predicted": round(found), "published": speed})
        if memory:
            predicted = sum(memory_bytes(run, H100).values()) / GIB
            rows.append({"metric": f"{name}: GiB/GPU", "predicted": round(predicted, 1), "published": memory})
        for row in rows[-2 if memory else -1 :]:
            row |= {"off": round(row["predicted"] / row["published"] - 1, 3), "source": source}
    return rows


# -------------------------------------------------------------------------------------------------------- tables


def bytes_per_parameter(mode: str, devices: int = 1) -> float:
    """Bytes a device keeps of each trained parameter through a step, in bfloat16 with AdamW.

    Weights, gradients and two moments in float32 are 16. Whole weights have a copy in bfloat16 while a step lasts, in
    TRL's stages DDP has one of the gradients. DeepSpeed keeps weights and gradients in bfloat16 (Rajbhandari et al.,
    arXiv:1910.02054).
    """
    whole = {"one": 16 + 2, "ddp": 16 + 2, "ddp_of_trl": 16 + 2 + 4, "zero2": 2 + 14 / devices}
    return whole.get(mode, 16 / devices)


def memory_table(devices: int = 8) -> str:
    """Bytes a parameter of the policy, by stage and mode; other models are as large as the policy."""
    modes = ("one", "ddp", "ddp_of_trl", "fsdp2", "zero2", "zero3")
    one, ddp, of_trl, fsdp2, zero2, zero3 = (bytes_per_parameter(mode, devices) for mode in modes)
    others = 4 + 4  # reference and reward model, whole on each device
    rows = {
        "pretrain, vision": (one, ddp, fsdp2, None, None, "fsdp2: 4 more in evaluations and at the end"),
        "sft": (one, of_trl, None, zero2, zero3, "with LoRA 4, with load_in_4bit 0.5, and adapters"),
        "reward": (one, of_trl, None, zero2, None, "the same"),
        "ppo, shared critic": (one + others, ddp + others, fsdp2 + others, None, None, "fsdp2: 2 more in rollouts"),
        "ppo, critic separate": (2 * one + others, 2 * ddp + others, 2 * fsdp2 + others, None, None, "4 more"),
        "ppo, LoRA": (4 + 4, 4 + 4, 4 / devices + 4, None, None, "fsdp2: 2 more; the first 4 is base and reference"),
    }
    lines = [f"| stage | one GPU | ddp | fsdp2, {devices} GPUs | zero2 | zero3 | besides |", "|---" * 7 + "|"]
    for stage, (*cells, note) in rows.items():
        lines.append(f"| {stage} | {' | '.join('-' if cell is None else f'{cell:g}' for cell in cells)} | {note} |")
    return "\n".join(lines)


SIZES = {
    "0.1 B (small)": Shape(12, 768, 6, 6, 128, 2048, 32768, tied=True),
    "0.5 B (base)": Shape(24, 1280, 10, 10, 128, 3456, 32768, tied=True),
    "1.5 B": Shape(28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    "8 B": LLAMA_8B,
    "32 B": Shape(64, 5120, 40, 8, 128, 27648, 151936),
}
WAYS = [("1 GPU", 1, "ddp"), ("ddp 8", 8, "ddp"), ("fsdp2 8", 8, "fsdp2"), ("fsdp2 64", 64, "fsdp2")]
WAYS += [("hsdp 8 x 8", 64, "hsdp"), ("hsdp 32 x 8", 256, "hsdp")]


def speed_table(efficiency: float) -> str:
    """Thousand tokens a second of all GPUs in pretraining, 16,384 tokens a GPU and micro-batch, and GB of each."""
    lines = [f"| model | {' | '.join(name for name, _, _ in WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for name, shape in SIZES.items():
        cells = []
        for _, devices, mode in WAYS:
            recompute = "none" if shape.parameters < 1e9 else "full"
            run = Run(shape, devices, mode, context=2048, rows=8, accumulation=4, recompute=recompute)
            parts = memory_bytes(run, H100)
            evaluated = 4 * shape.parameters if mode != "ddp" else 0  # whole weights beside the shares
            memory = max(sum(parts.values()), parts["states"] + evaluated)
            speed = step_seconds(run, H100, efficiency)["tokens_per_second_per_device"] * devices / 1e3
            cells.append("-" if memory > 0.9 * H100.memory else f"{speed:,.0f} k, {memory / 1e9:.0f} GB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- measured


def train(folder: Path, rows: int, steps: int) -> None:
    """One process's part: trains 12 M parameters, 16 x 256 tokens an update; the main one prints tokens a second."""
    import torch
    from transformers import AutoModelForCausalLM

    from lmkit.config import StageConfig
    from lmkit.models.attention import packed_attention
    from lmkit.models.presets import ModelConfig, transformers_config
    from lmkit.stage import Stage
    from lmkit.training import loop
    from lmkit.training.losses import CausalLMLoss
    from lmkit.training.options import TrainConfig

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "head_dim": 64, "intermediate_size": 1024}
    config = ModelConfig(preset="tiny", arch="llama", context_length=256, **sizes)
    model = AutoModelForCausalLM.from_config(transformers_config(config, 4096))
    data = torch.randint(0, 4096, (256, 257), generator=torch.Generator().manual_seed(0))
    options = {"max_steps": steps + 1, "warmup_steps": 0, "logging_steps": 1, "save_steps": steps + 1}
    options |= {"per_device_train_batch_size": rows, "global_batch_size": 16, "optim": "adamw_torch_fused"}
    accelerator = loop.make_accelerator(False, 384)
    fetch = lambda numbers: {"input_ids": data[numbers, :-1], "labels": data[numbers, 1:]}  # noqa: E731
    with Stage("scaling", StageConfig(output_dir=folder)) as stage, packed_attention(model):
        given = {"accelerator": accelerator, "stage": stage}
        loop.fit(CausalLMLoss(model), fetch, len(data), TrainConfig(**options), **given)
    if accelerator.is_main_process:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        print(json.dumps({"tokens_per_second": [row["tokens_per_second"] for row in found[1:] if "loss" in row]}))


def measure(steps: int, reps: int, rows: int) -> None:
    """One process on core 0, two on cores 0 and 1, in turns, the same update; medians of steps, the first left out."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(reps):
        for number, speeds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
                world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
                ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
                places = [{}] if number == 1 else ranks
                command = [sys.executable, __file__, "--train", folder, "--rows", str(rows), "--steps", str(steps)]
                running = []
                for core, place in enumerate(places):
                    pinned, options = ["taskset", "-c", str(core), *command], {"stdout": subprocess.PIPE, "text": True}
                    running.append(subprocess.Popen(pinned, env=environment | place, **options))
                output = [process.communicate()[0] for process in running]
                assert not any(process.returncode for process in running), output
                speeds += json.loads(output[0].strip().splitlines()[-1])["tokens_per_second"]
                print(json.dumps({"processes": number, "tokens_per_second": speeds[-steps:]}), flush=True)
    one, two = (statistics.median(speeds) for speeds in found.values())
    line = {"metric": "two_processes_over_one", "value": round(two / one, 2), "wanted": 1.6}
    print(json.dumps(line | {"tokens_per_second": [round(one), round(two)], "rows_at_once": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--efficiency", type=float, default=0.4, help="of the tables: mfu of one GPU")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows a process takes at once")
    args = parser.parse_args()
    if args.train:
        train(args.train, args.rows, args.steps)
    elif args.measure:
        measure(args.steps, args.reps, args.rows)
    elif args.tables:
        print(f"{memory_table()}\n\n{speed_table(args.efficiency)}")
    else:
        for row in compare():
            print(json.dumps(row))
