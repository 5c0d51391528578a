"""Pretraining against `transformers.Trainer`: the same Llama, batch and corpus, tokens per second and memory.

    python benchmarks/pretrain.py                                   # bf16 and fp32, 3 processes a side: 10 minutes
    python benchmarks/pretrain.py --dtypes bf16 --reps 1 --steps 2  # to see that it runs
    python benchmarks/pretrain.py --sides trainer,trainer_compiled,lmkit_compiled   # Trainer compiles for minutes
    python benchmarks/pretrain.py --side lmkit --dtype bf16 [--compile] [--micro_batch 16] [--profile]

The peer is ../shared/bench/pretrain_hf.py, which trains 12.19 M parameters (6 layers, width 384, vocabulary 4096, tied)
on batches of 16 x 256 tokens with fused AdamW. The sides take turns as processes (A B A B ...). lmkit's side is
`training.loop.fit` with a real stage, the same update in micro-batches of 4 rows, compiled of 8 (`--micro_batch`): the
update does not depend on them, and the activations of fewer rows stay in cache.

Ratios of medians, in wall seconds and in CPU seconds of the process (which a busy machine disturbs least):
`pretrain_vs_trainer_bf16`, `pretrain_vs_trainer_fp32`. `pretrain_memory_ratio`: the peak above a process that
imported the same and does nothing, of lmkit over Trainer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = Path(__file__).resolve().parents[2] / "shared" / "bench"
BATCH, CONTEXT, WARM = 16, 256, 2
ROWS = {"lmkit": 4, "lmkit_compiled": 8}  # of a micro-batch
IDLE = {
    "lmkit": "import sys; sys.path[:0] = ['benchmarks']; import pretrain; pretrain.imports()",
    "trainer": "import numpy, torch; from transformers import LlamaForCausalLM, Trainer, TrainingArguments",
}


def imports():
    """What lmkit's side needs, and the peer's model and corpus."""
    sys.path.insert(0, str(PEER))
    import common
    import torch
    from transformers import LlamaForCausalLM

    from lmkit.models.attention import packed_attention
    from lmkit.training import loop
    from lmkit.training.losses import CausalLMLoss

    return common, torch, LlamaForCausalLM, packed_attention, loop, CausalLMLoss


def train(args: argparse.Namespace) -> None:
    """lmkit's side: one JSON line for each step after the first two."""
    common, torch, LlamaForCausalLM, packed_attention, loop, CausalLMLoss = imports()
    from lmkit.config import StageConfig
    from lmkit.stage import Stage
    from lmkit.training.options import TrainConfig

    torch.manual_seed(0)
    model = LlamaForCausalLM(common.llama_config())
    tokens = torch.from_numpy(common.shakespeare_ids().astype("int64"))

    def fetch(numbers):
        rows = tokens[torch.from_numpy(numbers)[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

    meter, walls = common.Meter(), []

    def step_done():
        seconds, times = meter.stop()
        walls.append(seconds)
        if len(walls) > WARM:
            facts = {"side": "lmkit", "dtype": args.dtype, "rss_mb": round(common.peak_rss_mb()), **times}
            emit("pretrain", BATCH * CONTEXT / seconds, "tokens/s", **facts)
        meter.start()
        return {}

    rows_at_once = args.micro_batch or ROWS["lmkit_compiled" if args.compile else "lmkit"]
    config = TrainConfig(
        max_steps=WARM + args.steps,
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=BATCH // rows_at_once,
        learning_rate=6e-4,
        warmup_steps=1,
        optim="adamw_torch_fused",
        bf16=args.dtype == "bf16",
        torch_compile=args.compile,
        logging_steps=10_000,
        eval_steps=1,
        save_steps=10_000,
    )
    accelerator = loop.make_accelerator(config.bf16, model.config.hidden_size)
    with tempfile.TemporaryDirectory() as folder, Stage("pretrain", StageConfig(output_dir=folder)) as stage:
        options = {"accelerator": accelerator, "stage": stage, "evaluate": step_done}
        with packed_attention(model):
            run = lambda: loop.fit(CausalLMLoss(model), fetch, (len(tokens) - 1) // CONTEXT, config, **options)  # noqa: E731
            if not args.profile:
                run()
                return
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def measure(command: list[str]) -> list[dict]:
    """The JSON lines a process printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def idle_mb(side: str) -> float:
    script = f"{IDLE[side]}\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare(args: argparse.Namespace) -> None:
    import torch
    import transformers

    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
    rows_of = dict.fromkeys(ROWS, args.micro_batch) if args.micro_batch else ROWS
    facts |= {"threads": torch.get_num_threads(), "micro_batch": rows_of, "reps": args.reps}
    idle = {side: idle_mb(side) for side in IDLE}
    emit("idle_process", {side: round(mb) for side, mb in idle.items()}, "MiB")
    ours = {name: [sys.executable, __file__, "--side", "lmkit", "--micro_batch", str(n)] for name, n in rows_of.items()}
    theirs = [sys.executable, str(PEER / "pretrain_hf.py"), "--impl", "trainer-llama", "--warm", str(WARM)]
    sides = {"trainer": theirs, "trainer_compiled": [*theirs, "--compile"]}
    sides |= {"lmkit": ours["lmkit"], "lmkit_compiled": [*ours["lmkit_compiled"], "--compile"]}
    above: dict[tuple[str, str], float] = {}
    for dtype in args.dtypes.split(","):
        rows = {side: [] for side in args.sides.split(",")}
        for _ in range(args.reps):
            for side, found in rows.items():
                found += measure([*sides[side], "--dtype", dtype, "--steps", str(args.steps)])
        speed, per_cpu = {}, {}
        for side, found in rows.items():
            times = [row["config"] for row in found]
            speed[side] = statistics.median(row["value"] for row in found)
            per_cpu[side] = statistics.median(BATCH * CONTEXT / time["cpu_s"] for time in times)
            peak = max(time["rss_mb"] for time in times)
            above[side, dtype] = peak - idle[side.removesuffix("_compiled")]
            measured = {"per_second": round(speed[side]), "per_cpu_second": round(per_cpu[side])}
            emit(f"pretrain_{side}_{dtype}", measured, "tokens", peak_mib=peak, steps=len(found))
        for side in rows.keys() - {"trainer"}:
            ratios = {"per_second": round(speed[side] / speed["trainer"], 3)}
            ratios["per_cpu_second"] = round(per_cpu[side] / per_cpu["trainer"], 3)
            emit(f"pretrain_vs_trainer_{dtype}", ratios, "x", side=side, **facts)
            memory = round(above[side, dtype] / above["trainer", dtype], 3)
            emit("pretrain_memory_ratio", memory, "x above idle", side=side, dtype=dtype)


def emit(name: str, value: object, unit: str, **config: object) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit, "config": config}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["lmkit"])
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--sides", default="trainer,lmkit,lmkit_compiled")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--micro_batch", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    (train if args.side else compare)(args)


if __name__ == "__main__":
    main()
