"""Formatting and tokenising demonstrations beside TRL's own preparation: the same rows in, the same ids and labels out.

Both begin with a `datasets.Dataset` of conversations (prompt, completion) and end with one of input_ids and labels:
lmkit by `to_prompt_completion` and `encode_demonstrations`, TRL by `SFTTrainer._prepare_dataset`. They take turns on
blocks of rows, one process each; the first rows of both are compared id by id.

    python benchmarks/rows.py --num_rows 100000 --rounds 5
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from lmkit.data.encode import encode_demonstrations
from lmkit.data.formats import to_prompt_completion
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.train import train_tokenizer

DATA = Path(__file__).parents[1] / "data/tales"
MAX_LENGTH = 512


def conversations(num_rows: int) -> Dataset:
    """The demonstrations of tales, told again and again under another number, so that no two rows are equal."""
    lines = gzip.decompress((DATA / "sft.jsonl.gz").read_bytes()).decode().splitlines()
    stories = [json.loads(line) for line in lines]

    def row(number: int) -> dict:
        story = stories[number % len(stories)]
        return {
            "prompt": [{"role": "user", "content": f"{number}. {story['prompt']}"}],
            "completion": [{"role": "assistant", "content": f"{story['completion']} {number}"}],
        }

    return Dataset.from_list([row(number) for number in range(num_rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_rows", type=int, default=100_000, help="for each side, all rounds together")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of rows, on which the sides take turns")
    options = parser.parse_args()
    disable_progress_bars()
    rows = conversations(options.num_rows)
    stories = gzip.decompress((DATA / "text.validation.txt.gz").read_bytes()).decode().split("\n\n")
    tokenizer = train_tokenizer(lambda: stories, vocab_size=1024, trainer="tokenizers")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_length=MAX_LENGTH, bf16=False, use_cpu=True, report_to=[])
        model = build_model(ModelConfig(preset="nano", context_length=MAX_LENGTH), tokenizer)
        few = rows.select(range(2))
        trainer = SFTTrainer(model, args, train_dataset=few, processing_class=tokenizer)

    sides = {
        "lmkit": lambda part: encode_demonstrations(to_prompt_completion(part), tokenizer, MAX_LENGTH)[0],
        "trl": lambda part: trainer._prepare_dataset(part, tokenizer, args, False, None, "train"),
    }
    ours, theirs = (prepare(rows.select(range(min(500, len(rows))))) for prepare in sides.values())
    for name in ("input_ids", "labels"):
        assert ours[name][:] == theirs[name][:], f"lmkit and TRL differ in {name}"

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    size = options.num_rows // options.rounds
    for number in range(options.rounds):
        part = rows.select(range(number * size, (number + 1) * size)).flatten_indices()
        for name, prepare in sides.items():
            start = time.perf_counter()
            made = prepare(part)
            seconds[name].append(time.perf_counter() - start)
            assert len(made) == size
            emit(f"seconds_{name}", seconds[name][-1], "s", round=number, rows=size)
    for name, taken in seconds.items():
        emit(f"rows_{name}", size / statistics.median(taken), "rows/s", seconds=[round(one, 2) for one in taken])
    ratios = [theirs / ours for ours, theirs in zip(seconds["lmkit"], seconds["trl"])]
    emit(
        "rows_vs_trl",
        statistics.median(ratios),
        "times",
        rounds=[round(one, 2) for one in ratios],
        rows=size * options.rounds,
    )


def emit(name, value, unit, **config):
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "config": config}), flush=True)


if __name__ == "__main__":
    main()
