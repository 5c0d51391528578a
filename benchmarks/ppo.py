"""A PPO iteration of lmkit against TRL 1.12's PPOTrainer, and the sampler against `generate`: ratios as JSON lines.

    python benchmarks/ppo.py --peer-python "$PEERS/trl112/bin/python" --results ppo.jsonl    # a round: about 4 minutes
    python benchmarks/ppo.py --sides same,default --updates 1                                # lmkit alone

A side is a process of its own, and the sides take turns, `--rounds` times. Each measurement is appended to --results;
the ratios are of medians over all that the file holds, so that rounds may be run one at a time. The peer is
`--peer-script`, which needs an environment of its own (trl 1.12, the last with a PPO trainer).

Shapes are the peer's: a Llama of 12.19 M parameters, 64 episodes of 16 to 32 prompt tokens (half of them 32) and 48
sampled ones, 4 epochs of one mini-batch. `same`: what the peer computes, in float32: policy, reference, reward model
and a separate critic, the same number of tokens, 4 optimizer steps; padding and logits that nobody reads are left out.
`default`: lmkit's defaults, a shared critic and the precision that is faster here. `lora`: that with adapters on one
frozen base.
The first iteration of a process is not counted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEER = Path(__file__).parents[2] / "shared" / "bench" / "ppo_trl.py"
SHAPE = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 512, "pad_token_id": 0}
EPISODES, PROMPT, COMPLETION, EPOCHS = 64, 32, 48, 4
PEER_TIMES = {"rollout": "rollout_s", "score": "scoring_s", "train": "train_s"}
SAMPLER = Path(__file__).with_name("sampler.py")


def emit(name: str, value: float, unit: str, **config: object) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit, "config": config}), flush=True)


# ------------------------------------------------------------------------------------------------- lmkit in a process


def run_side(side: str, updates: int) -> None:
    """One process: an iteration that is not counted and `updates` that are; prints seconds of each and the peak RSS."""
    import torch
    import transformers
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from lmkit.rl.config import PPOConfig
    from lmkit.rl.prompts import Prompts
    from lmkit.rl.trainer import PPOTrainer

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, tie_word_embeddings=True, num_labels=1)
    options = {"total_episodes": EPISODES * (updates + 1), "rollout_batch_size": EPISODES, "max_new_tokens": COMPLETION}
    options |= {"num_ppo_epochs": EPOCHS, "learning_rate": 1e-5, "missing_eos_penalty": 0.0}
    if side == "same":
        options |= {"critic": "separate", "bf16": False, "temperature": 1.0}
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(PROMPT // 2, PROMPT + 1, (4 * EPISODES,), generator=generator).tolist()
    lengths = [PROMPT if row % 2 else length for row, length in enumerate(short)]
    ids = [torch.randint(3, 4096, (length,), generator=generator).tolist() for length in lengths]
    rows = Dataset.from_dict({"prompt": ["w3"] * len(ids)})
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            LlamaForCausalLM(shape),
            LlamaForSequenceClassification(shape),
            PPOConfig(**options),
            rows,
            processing_class=_tokenizer(),
            peft_config=_adapters() if side == "lora" else None,
            output_dir=folder,
            say=lambda text: None,
        )
        trainer.train_prompts, trainer.stop_token_ids = Prompts(rows, ids), []  # ids as they are; nothing ends early
        trainer.train()
        logged = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][1:]
    config = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    config["precision"] = trainer.accelerator.mixed_precision
    for row in logged:
        parts = {part: row[f"time/{part}"] for part in ("rollout", "reward", "score", "train")}
        parts["score"] += parts.pop("reward")
        emit(side, EPISODES / row["perf/episodes_per_second"], "s", **parts, **config)
    emit(f"{side}_rss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB", **config)


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(4096)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w1")


def _adapters():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


# ------------------------------------------------------------------------------------------------------ all the sides


def measure(side: str, args: argparse.Namespace) -> list[dict]:
    """The measurements of one process of a side, under the names "SIDE" and "SIDE_rss"."""
    if side == "trl":
        command = [args.peer_python, str(args.peer_script), "--updates", str(args.updates)]
        command += ["--batch", str(EPISODES), "--prompt", str(PROMPT), "--response", str(COMPLETION)]
        command += ["--epochs", str(EPOCHS), "--num_mini_batches", "1"]
    elif side == "sampler":
        command = [sys.executable, str(SAMPLER), "--reps", "2"]
    else:
        command = [sys.executable, __file__, "--side", side, "--updates", str(args.updates)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if side != "trl":
        return rows
    for row in rows:
        row["name"] = "trl_rss" if row["unit"] == "MiB" else "trl"
        row["config"] |= {part: row["config"][name] for part, name in PEER_TIMES.items() if name in row["config"]}
    return rows


def summarise(rows: list[dict]) -> None:
    """Medians with their split, and every ratio whose two sides were measured."""
    values = {name: [row["value"] for row in rows if row["name"] == name] for name in {row["name"] for row in rows}}
    medians = {name: statistics.median(found) for name, found in values.items()}
    for side in ("trl", "same", "default", "lora"):
        if side not in values:
            continue
        split = {part: statistics.median(r["config"][part] for r in rows if r["name"] == side) for part in PEER_TIMES}
        spread = {"min": min(values[side]), "max": max(values[side]), "num": len(values[side])}
        emit(f"ppo_{side}_seconds", medians[side], "s", **split, **spread, rss_mib=medians[f"{side}_rss"])
    goals = {"same": ("ppo_vs_trl_same_arithmetic", 1.1), "default": ("ppo_vs_trl_default", 3.0)}
    for side, (name, goal) in goals.items():
        if {"trl", side} <= values.keys():
            emit(name, medians["trl"] / medians[side], "x", goal=f">= {goal}")
    for side in ("default", "same", "lora"):
        if {"trl_rss", f"{side}_rss"} <= values.keys():
            ratio = medians[f"{side}_rss"] / medians["trl_rss"]
            emit("ppo_memory_ratio", ratio, "x", side=side, goal="<= 0.5")
    for row in rows:
        if row["name"] == "sampler_vs_generate":
            print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of the peer's environment; without it, lmkit alone is measured")
    parser.add_argument("--peer-script", type=Path, default=PEER)
    parser.add_argument("--sides", default="trl,same,default,lora,sampler")
    parser.add_argument("--updates", type=int, default=1, help="iterations that are counted in each process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, help="JSON lines of all measurements so far; made when absent")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(args.side, args.updates)
    if args.peer_python and not args.peer_script.is_file():
        parser.error(f"{args.peer_script} does not exist; give the peer's script with --peer-script")
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if _exists(args.results) else []
    for _ in range(args.rounds):
        for side in [s for s in args.sides.split(",") if s and (s != "trl" or args.peer_python)]:
            found = measure(side, args)
            rows += found
            if args.results:
                with args.results.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    summarise(rows)


def _exists(path: Path | None) -> bool:
    return path is not None and path.is_file()


if __name__ == "__main__":
    main()
