"""The sampler against `generate` of transformers: tokens per second without early stopping, one JSON line each.

    python benchmarks/sampler.py                     # 12.19 M Llama, batch 64, 32 + 64 tokens: about 2 minutes
    python benchmarks/sampler.py --new 8 --reps 1    # to see that it runs

The sides take turns in one process (A B C A B C ...), after one round that is not counted. `sampler_vs_generate` is a
ratio of medians, of wall seconds and of the CPU seconds of this process, which a busy machine disturbs least. In
bfloat16 both weights and products are, against `generate` in float32.
"""

import argparse
import copy
import json
import statistics
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from lmkit.generation.sampler import sample

SHAPE = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 512}


def sides(args):
    """Name -> a function that samples args.batch completions of args.new tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval().to(args.device)
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    low = copy.deepcopy(model).to(torch.bfloat16)
    prompts = torch.randint(3, 4096, (args.batch, args.prompt), device=args.device)
    whole = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": args.new}

    def ours(model):
        options = {"max_new_tokens": args.new, "stop_token_ids": [], "batch_size": args.batch}
        return sample(model, prompts.tolist(), generator=torch.Generator().manual_seed(0), **options)

    def theirs(model):
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **whole)

    def autocast(model):
        with torch.autocast(args.device, torch.bfloat16):
            return ours(model)

    return {
        "generate": lambda: theirs(model),
        "sample": lambda: ours(model),
        "sample_autocast": lambda: autocast(model),
        "generate_bf16": lambda: theirs(low),
        "sample_bf16": lambda: ours(low),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="names of sides, with commas between")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    runs = {name: run for name, run in sides(args).items() if not args.only or name in args.only.split(",")}
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds = {(clock, name): [] for clock in clocks for name in runs}
    for round_ in range(-1, args.reps):
        for name, run in runs.items():
            started = {clock: read() for clock, read in clocks.items()}
            with torch.no_grad():
                run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 0:
                for clock, read in clocks.items():
                    seconds[clock, name].append(read() - started[clock])
    config = {k: getattr(args, k) for k in ("batch", "prompt", "new", "reps", "device")}
    config |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__}
    median = {key: statistics.median(values) for key, values in seconds.items()}
    for (clock, name), value in median.items():
        rates = [round(args.batch * args.new / s) for s in sorted(seconds[clock, name], reverse=True)]
        emit(f"tokens_per_second/{name}", args.batch * args.new / value, "tokens/s", clock=clock, **config, all=rates)
    for clock, name in median:
        if name.startswith("sample") and "generate" in runs:
            ratio = median[clock, "generate"] / median[clock, name]
            emit(f"sampler_vs_generate/{name}", ratio, "ratio", clock=clock, **config)


def emit(name, value, unit, **config):
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "config": config}), flush=True)


if __name__ == "__main__":
    main()
