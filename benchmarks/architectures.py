"""Architectures at equal training FLOPs: one line a row and seed into a JSON-lines file, and the table from it.

    python benchmarks/architectures.py                               # 2e13 FLOP a row, 3 seeds, tiny-shakespeare
    python benchmarks/architectures.py --budget 3e12 --seeds 0       # one seed and a seventh of the FLOPs
    python benchmarks/architectures.py --rows lstm,transformer       # some of them
    python benchmarks/architectures.py --page docs/architectures.md  # nothing is run: the tables into the page

The rows are recipes/configs/architectures/rows.yaml, each a change of one section of the chain file beside it, trained
by recipes/pretrain.py in a process of its own; text and tokenizer are made first (`--tokenizer`, `--shards` for others,
such as the books). A row trains for budget / (FLOP of a token, as `lmkit.training.mfu` counts them) tokens, to the next
update. What is in the file already is not run again: the command goes on where it was stopped, with the row that it was
stopped in from that row's start. A row that fails costs no other its line; the command ends with 1 and names it.

`tokens_per_cpu_second` is of the training loop without its evaluation; CPU seconds of a core that others use too buy
less than those of an idle one, so compare it between rows of one quiet run alone. `peak_mib` is
of the process above one that imported the same, `bits_per_byte` is strided, as in docs/pretrain.md. n-grams see all of
the text once and have no budget. The group `depth` has a fifth of the budget, and the first of the seeds alone.
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "architectures"
RUN = Path("runs/architectures")
ORDERS = (5, 7)
FULL = 2e13
KEYS = ("group", "row", "rate", "seed", "budget")  # of a line: what it is, and not what was found


# ------------------------------------------------------------------------------------------------------------- one row


def counted(order: int, tokenizer_dir: str, shards: str, validation_tokens: int) -> dict:
    """The Kneser-Ney line of one order: n-grams, tokens per CPU second of the fit, memory."""
    from lmkit.data.shards import Shards
    from lmkit.evaluation.baselines import baselines
    from lmkit.evaluation.held_out import HeldOut
    from lmkit.models import ngram
    from lmkit.tokenization.read import load_tokenizer

    tokenizer, folder, idle = load_tokenizer(tokenizer_dir), Path(shards), peak_mib()
    tokens = Shards.open(folder / "train").tokens[:]
    held_out = HeldOut.start_of(Shards.open(folder / "validation"), validation_tokens, tokenizer, 128)
    start = time.process_time()
    model = ngram.fit(tokens, order, len(tokenizer))
    speed = len(tokens) / (time.process_time() - start)
    facts = {"parameters": sum(len(table.codes) for table in model.tables), "tokens_per_cpu_second": speed}
    facts |= {"peak_mib": peak_mib() - idle, "tokens": len(tokens)}
    return facts | {"bits_per_byte": baselines(tokens, held_out.tokens, tokenizer, [order])[f"kneser_ney_{order}"]}


def trained(file: str) -> dict:
    """The pretraining recipe as it is, with a clock around its loop that stops while it evaluates."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import pretrain
    import torch  # noqa: F401
    from peft import get_peft_model  # noqa: F401

    from lmkit.config import load
    from lmkit.errors import Stopped
    from lmkit.evaluation import baselines, held_out  # noqa: F401
    from lmkit.tracking import read_jsonl
    from lmkit.training import loop

    config, fit, seconds, idle = load(pretrain.PretrainConfig, ["--config", file]), loop.fit, [], peak_mib()

    def clocked(*args, evaluate, sample, **options):
        def outside(function):
            def paused():
                started = time.process_time()
                try:
                    return function()
                finally:
                    seconds.append(started - time.process_time())

            return paused

        started = time.process_time()
        try:
            return fit(*args, evaluate=outside(evaluate), sample=outside(sample), **options)
        finally:
            seconds.append(time.process_time() - started)

    loop.fit, stopped = clocked, None
    try:
        pretrain.main(config)
    except Stopped as error:
        stopped = str(error).split(". Samples")[0]
    rows = [row for row in read_jsonl(config.output_dir / "metrics.jsonl") if "loss" in row]
    facts = {"stopped": stopped, "peak_mib": peak_mib() - idle, "train_cpu_seconds": sum(seconds)}
    facts["largest_grad_norm"] = max((row["grad_norm"] for row in rows), default=None)
    if stopped is None:
        metrics = json.loads((config.output_dir / "stage.json").read_text())["metrics"]
        facts |= {"train_loss": metrics["loss"], "bits_per_byte": metrics["eval/bits_per_byte"]}
    return facts


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------------------ all rows


def plan(args: argparse.Namespace) -> list[dict]:
    """Every row to run: its group, name, seed, and section of the pretraining recipe without its length."""
    from lmkit.config import merge
    from lmkit.strict_yaml import read_mapping

    base, rows = read_mapping(CONFIGS / "rlhf.yaml")["pretrain"], read_mapping(CONFIGS / "rows.yaml")
    base |= {"tokenizer": str(args.tokenizer), "shards": str(args.shards), "ngram_orders": []}
    planned = [
        {"group": "table", "row": name, "budget": args.budget, "section": merge(base, change)}
        for name, change in rows["table"].items()
    ]
    planned = [row | {"seed": seed} for seed in args.seeds for row in planned]
    for rate in rows["depth_rates"]:
        deep = merge(merge(base, rows["depth_base"]), {"train": {"learning_rate": rate}})
        fixed = {"group": "depth", "rate": rate, "budget": args.budget / 5, "seed": args.seeds[0]}
        planned += [fixed | {"row": name, "section": merge(deep, change)} for name, change in rows["depth"].items()]
    known = {
        "counted",
        *(f"kneser_ney_{order}" for order in ORDERS),
        *(row[key] for row in planned for key in KEYS[:2]),
    }
    if unknown := [name for name in args.rows.split(",") if name and name not in known]:
        sys.exit(f"--rows {','.join(unknown)}: no such row or group. There are {', '.join(sorted(known))}.")
    return [row for row in planned if wanted(row, args.rows)]


def wanted(row: dict, names: str) -> bool:
    return not names or bool({row["row"], row["group"]} & set(names.split(",")))


def length(section: dict, budget: float, vocab_size: int) -> dict:
    """Parameters, FLOP of a token, and how many updates the budget pays for."""
    import torch
    from transformers import AutoModelForCausalLM

    from lmkit.config import validate
    from lmkit.models.presets import ModelConfig, transformers_config
    from lmkit.training.mfu import flops_per_token

    config = validate(ModelConfig, section["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(config, vocab_size))
    context = config.sizes()["context_length"]
    flops, tokens = flops_per_token(model, context), section["train"]["per_device_train_batch_size"] * context
    steps = max(1, math.ceil(budget / flops / tokens))
    return {"parameters": model.num_parameters(), "flops_per_token": flops, "steps": steps, "tokens": steps * tokens}


def run_row(row: dict, vocab_size: int, runs: Path) -> dict:
    """One row in a process of its own, in a folder of `runs`; what it found, with what it was."""
    from lmkit.config import merge
    from lmkit.strict_yaml import dump_yaml

    size = length(row["section"], row["budget"], vocab_size)
    name = f"{row['group']}-{row['row']}-{row.get('rate', '')}-{row['seed']}".replace(" ", "_").replace(":", "")
    folder = runs / f"{row['budget']:g}" / name
    train = {"max_steps": size["steps"], "save_steps": size["steps"]}
    section = merge(row["section"], {"output_dir": str(folder), "seed": row["seed"], "train": train})
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: the clock is to be of one process
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f"{name}.yaml")
    file.write_text(dump_yaml(section), encoding="utf-8")
    found = child("--train", str(file))
    if found["stopped"] is None:
        found["tokens_per_cpu_second"] = size["tokens"] / found["train_cpu_seconds"]
    return {key: value for key, value in row.items() if key != "section"} | size | found


def child(*words: str) -> dict:
    """The JSON line that this program prints last when it is started with `words`; RuntimeError when it fails."""
    wall, cpu = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.time() - wall, "cpu_seconds": cpu}


def prepare(args: argparse.Namespace) -> int:
    """Makes tokenizer and shards where the default ones are missing; the size of the vocabulary."""
    if not args.shards.exists() and args.shards == RUN / "tokenizer/shards":
        if not (ROOT / "runs/text/shakespeare/train.txt").exists():
            sys.exit(
                "runs/text/shakespeare is missing: cut tiny-shakespeare with the first lines of `make shakespeare`"
            )
        words = ["recipes/rlhf.py", "--config", str(CONFIGS / "rlhf.yaml"), "--only", "tokenizer"]
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=sys.stderr)
    return json.loads((args.shards / "train" / "meta.json").read_text())["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=FULL, help="training FLOP a row")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rows", default="", help="names of rows or groups (counted, table, depth), with commas; all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "architectures.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=RUN / "tokenizer/tokenizer")
    parser.add_argument("--shards", type=Path, default=RUN / "tokenizer/shards")
    parser.add_argument("--page", type=Path, help="write the tables of --output into this page, and run nothing")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.train or args.count:
        from lmkit.processes import die_with_parent

        die_with_parent()
        print("\n" + json.dumps(trained(args.train) if args.train else counted(**args.count)))
        return
    if args.page:
        if not args.output.exists():
            sys.exit(f"--output {args.output} does not exist: measure first, or name the file that has the lines")
        args.page.write_text(with_tables(args.page.read_text(), args.output.stem, read_lines(args.output)))
        return
    vocab_size, rows = prepare(args), plan(args)
    validation_tokens = rows[0]["section"]["validation_tokens"] if rows else 32768
    known = {tuple(line.get(key) for key in KEYS) for line in read_lines(args.output)}
    todo: list[tuple[dict, Callable[[dict], dict]]] = []
    for order in ORDERS:
        facts = {"order": order, "validation_tokens": validation_tokens, "tokenizer_dir": str(args.tokenizer)}
        facts["shards"] = str(args.shards)
        row = {"group": "counted", "row": f"kneser_ney_{order}"}
        todo += [(row, lambda row, facts=facts: row | child("--count", json.dumps(facts)))] * wanted(row, args.rows)
    todo += [(row, lambda row: run_row(row, vocab_size, RUN / args.output.stem)) for row in rows]
    failed = []
    for row, run in todo:
        if tuple(map(row.get, KEYS)) not in known:
            try:
                keep(args.output, run(row))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed.append(" ".join(str(row[key]) for key in KEYS if key in row))
    if failed:
        sys.exit(f"{len(failed)} of {len(todo)} rows failed ({'; '.join(failed)}); the same command tries them again")


def keep(path: Path, line: dict) -> None:
    import torch

    line |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


# ------------------------------------------------------------------------------------------------------------ the page


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(lines: list[dict]) -> dict[str, list[str]]:
    """Lines of Markdown by the mark they belong to: a table for each budget in the file, the n-grams in all of them."""
    text: dict[str, list[str]] = {"table": [], "depth": []}
    for group, table in (("table", table_of), ("depth", depth_table)):
        for budget in sorted({line["budget"] for line in lines if line["group"] == group}):
            here = [line for line in lines if (line["group"], line.get("budget")) == (group, budget)]
            dates, seeds = {line["date"] for line in here}, sorted({line["seed"] for line in here})
            about = f"{budget:g} training FLOP a row; {' to '.join(dict.fromkeys([min(dates), max(dates)]))}, "
            about += f"torch {here[-1]['torch']}" + (f"; seed {seeds[0]}." if group == "depth" else ".")
            counted = [line for line in lines if line["group"] == "counted" and group == "table"]
            text[group] += [about, "", *table(counted + here), ""]
        text[group] = text[group][:-1]
    return text


def table_of(lines: list[dict]) -> list[str]:
    """Means and standard deviations over seeds of each row, in the order of rows.yaml, and of the difference from
    `transformer` over the seeds that both have; then what is not there yet."""
    from lmkit.strict_yaml import read_mapping

    planned = list(read_mapping(CONFIGS / "rows.yaml")["table"])
    order = [f"kneser_ney_{order}" for order in ORDERS] + planned
    rows: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda line: (order.index(line["row"]), line.get("seed", 0))):
        rows.setdefault(line["row"], []).append(line)
    default = {line["seed"]: line["bits_per_byte"] for line in rows.get("transformer", []) if "bits_per_byte" in line}
    shown = {name: name if ":" in name else f"`{name}`" for name in order}

    heads = "parameters, tokens, seeds, bits per byte, against `transformer`, tokens per CPU second, memory in MiB"
    table = [f"| | {heads.replace(', ', ' | ')} |", "|---|" + "---:|" * 7]
    for name, found in rows.items():
        first, ended = found[0], [line for line in found if "bits_per_byte" in line]
        bits = [line["bits_per_byte"] for line in ended]
        cells = [shown[name], f"{first['parameters']:,}", f"{first['tokens']:,}"]
        cells[1] += " n-grams" if first["group"] == "counted" else ""
        cells.append(", ".join(str(line["seed"]) for line in found if "seed" in line))
        score = f"{statistics.mean(bits):.4f}" if bits else ""
        score += f" ± {statistics.stdev(bits):.4f}" if bits[1:] else ""
        stops = [line["stopped"].split(":")[0] for line in found if line not in ended]
        cells.append(", ".join([*([score] if score else []), *(f"stopped at {stop}" for stop in stops)]))
        gaps = [line["bits_per_byte"] - default[line["seed"]] for line in ended if line.get("seed") in default]
        if first["group"] == "counted" and default:
            gaps = [bits[0] - statistics.mean(default.values())]
        gap = f"{statistics.mean(gaps):+.4f}" if gaps and name != "transformer" else ""
        cells.append(gap + (f" ± {statistics.stdev(gaps):.4f}" if gap and gaps[1:] else ""))
        for key in ("tokens_per_cpu_second", "peak_mib"):
            cells.append(f"{statistics.mean(line[key] for line in ended):,.0f}" if ended else "")
        table.append("| " + " | ".join(cells) + " |")
    missing = [shown[name] for name in planned if name not in rows]
    return [*table, "", f"Not run at these FLOPs: {', '.join(missing)}."] if missing else table


def depth_table(lines: list[dict]) -> list[str]:
    """Bits per byte of each placement of norms at each rate, or where it stopped; the largest norm of a gradient."""
    found = {(line["row"], line["rate"]): line for line in sorted(lines, key=lambda line: -line["seed"])}
    names, rates = dict.fromkeys(line["row"] for line in lines), dict.fromkeys(line["rate"] for line in lines)
    table = ["| norms | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |", "|---|" + "---:|" * len(rates)]
    for name in names:
        cells = [f"`{name}`"]
        for line in (found.get((name, rate)) for rate in rates):
            if line is None:
                cells.append("not run")
                continue
            score = f"{line['bits_per_byte']:.3f}" if "bits_per_byte" in line else line["stopped"].split(":")[0]
            cells.append(f"{score} (gradient up to {line['largest_grad_norm'] or math.inf:.3g})")
        table.append("| " + " | ".join(cells) + " |")
    return table


def with_tables(page: str, stem: str, lines: list[dict]) -> str:
    """The page with what stands between the marks of a file of results, by its name, replaced."""
    for group, table in tables(lines).items():
        if table:
            before, begin, rest = page.partition(f"<!-- {group} of {stem} -->\n")
            _, end, after = rest.partition(f"<!-- end of {stem} -->\n")
            if not end:
                sys.exit(f"the page has no <!-- {group} of {stem} --> with its <!-- end of {stem} -->")
            page = before + begin + "\n".join(table) + "\n" + end + after
    return page


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
