"""Scoring completions that share prompts: the prompt run once for each (`completion_scores`) against whole sequences.

    python benchmarks/scoring.py

The tiny preset with random weights on a CPU, one thread; tokens are those of whole sequences, seconds the least of
`--reps` by the process's own clock. A JSON line for each shape: prompt and longest completion in tokens, completions a
prompt.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForSequenceClassification

from lmkit.models.heads import completion_scores, last_token_scores
from lmkit.models.presets import ModelConfig, transformers_config

SHAPES = [(27, 70, 2), (27, 70, 8), (100, 70, 2), (100, 30, 4), (180, 60, 2), (180, 60, 8)]
VOCABULARY = 1024


def draw(prompt: int, completion: int, each: int, num: int, generator: torch.Generator) -> tuple[list, list]:
    """`num` completions, at most 20 tokens shorter than `completion`, behind prompts of up to two tokens more."""

    def ids(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    prompts = [ids(prompt + number % 3) for number in range(-(-num // each))]
    shorter = torch.randint(0, 20, (num,), generator=generator).tolist()
    return [prompts[row // each] for row in range(num)], [ids(completion - less) for less in shorter]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=4, help="times each side is measured")
    parser.add_argument("--num", type=int, default=128, help="completions to score")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers_config(ModelConfig(), VOCABULARY, pad_token_id=0, eos_token_id=0)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for shape in SHAPES:
        prompts, completions = draw(*shape, args.num, torch.Generator().manual_seed(0))
        whole = [prompt + completion for prompt, completion in zip(prompts, completions)]
        tokens, seconds = sum(map(len, whole)), {"apart": [], "shared": []}
        for _ in range(args.reps):
            start = time.process_time()
            apart = last_token_scores(model, whole)
            middle = time.process_time()
            shared = completion_scores(model, prompts, completions)
            seconds["apart"].append(middle - start)
            seconds["shared"].append(time.process_time() - middle)
        speed = {f"{name}_tokens_per_second": round(tokens / min(runs)) for name, runs in seconds.items()}
        ratio = min(seconds["apart"]) / min(seconds["shared"])
        row = dict(zip(("prompt", "completion", "completions_a_prompt"), shape)) | speed
        print(json.dumps(row | {"ratio": round(ratio, 2), "largest_difference": (apart - shared).abs().max().item()}))


if __name__ == "__main__":
    main()
