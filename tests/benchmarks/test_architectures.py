"""The table of architectures: its rows, its arithmetic, and that the page shows what the file of results says."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from lmkit.config import validate
from lmkit.strict_yaml import read_mapping

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


def planned(rows="", seeds=(0,), budget=1e12):
    return architectures.plan(Namespace(rows=rows, seeds=seeds, budget=budget, tokenizer="t", shards="s"))


def line(row, bits, group="table", budget=1e12, **more):
    facts = {"tokens_per_cpu_second": 1000.0, "peak_mib": 100.0, "parameters": 950_000, "tokens": 4096}
    facts |= {"date": "2026-11-21", "torch": "2.13.0", "seed": 0, "largest_grad_norm": 1.5}
    return {"row": row, "bits_per_byte": bits, "group": group, "budget": budget, **facts, **more}


def test_every_row_is_a_valid_section_and_changes_one_factor_of_the_default():
    import pretrain

    default = next(row["section"]["model"] for row in planned() if row["row"] == "transformer")
    for row in planned():
        validate(pretrain.PretrainConfig, row["section"])
        if ":" in row["row"]:
            factor, model = row["row"].split(": ")[0], row["section"]["model"]
            changed = {key for key in model if model[key] != default.get(key)}
            assert changed <= {"block", "intermediate_size"}
            assert len(model["block"]) == 1
            assert ("intermediate_size" in changed) == (factor == "activation")


def test_rows_of_the_table_have_like_numbers_of_parameters():
    sizes = {row["row"]: architectures.length(row["section"], 3e12, 768) for row in planned("table")}
    for name, size in sizes.items():
        assert 0.85e6 < size["parameters"] < 1.1e6, name
        # The budget is reached by the last update, not before.
        update = size["tokens"] // size["steps"] * size["flops_per_token"]
        assert 3e12 <= size["steps"] * update < 3e12 + update
    assert sizes["norms: post"]["flops_per_token"] == sizes["transformer"]["flops_per_token"]


def test_what_is_planned_by_name_group_and_seed():
    rows = planned(seeds=(0, 1))
    assert len(rows) == 2 * len(read_mapping(architectures.CONFIGS / "rows.yaml")["table"]) + 9
    depth = planned("depth", seeds=(3, 4))
    assert [(row["row"], row["rate"], row["seed"]) for row in depth[:4]] == [
        *((name, 0.0003, 3) for name in ("post", "pre", "deep")),
        ("post", 0.001, 3),
    ]
    assert {row["section"]["train"]["warmup_steps"] for row in depth} == {0}
    assert {row["section"]["model"]["num_hidden_layers"] for row in depth} == {24}
    assert [row["row"] for row in planned("lstm,norms: post")] == ["lstm", "norms: post"]


def test_a_table_for_each_budget_has_means_spreads_and_differences():
    lines = [line("transformer", 2.0), line("transformer", 2.2, seed=1), line("norms: post", 2.5)]
    lines += [line("kneser_ney_5", 1.9, group="counted"), line("lstm", 1.0, budget=1e10)]
    del lines[-2]["budget"], lines[-2]["seed"]  # n-grams have neither
    lines += [line("llama", 2.25), line("llama", 2.35, seed=1)]
    lines += [line("norms: deep", 2.4), *(line(f"norms: {name}", 0) for name in ("deep", "sandwich"))]
    lines[-2] |= {"seed": 1, "stopped": "step 9: the loss is nan over 2048 tokens"}
    lines[-1]["stopped"] = "step 3: the loss is nan"
    for stopped in lines[-2:]:
        del stopped["bits_per_byte"], stopped["tokens_per_cpu_second"]
    text = "\n".join(architectures.tables(lines)["table"])
    small, text = text.split("1e+12 training FLOP a row; 2026-11-21, torch 2.13.0.")
    assert small.startswith("1e+10 training FLOP a row; 2026-11-21, torch 2.13.0.")
    assert "| `lstm` | 950,000 | 4,096 | 0 | 1.0000 |  | 1,000 | 100 |" in small
    assert "| `kneser_ney_5` | 950,000 n-grams | 4,096 |  | 1.9000 |  |" in small
    assert "| `transformer` | 950,000 | 4,096 | 0, 1 | 2.1000 ± 0.1414 |  | 1,000 | 100 |" in text
    # Compared with the default over the seeds that both have.
    assert "| norms: post | 950,000 | 4,096 | 0 | 2.5000 | +0.5000 | 1,000 | 100 |" in text
    assert "| `llama` | 950,000 | 4,096 | 0, 1 | 2.3000 ± 0.0707 | +0.2000 ± 0.0707 | 1,000 | 100 |" in text
    assert "| `kneser_ney_5` | 950,000 n-grams | 4,096 |  | 1.9000 | -0.2000 |" in text
    assert "| norms: deep | 950,000 | 4,096 | 0, 1 | 2.4000, stopped at step 9 | +0.4000 | 1,000 | 100 |" in text
    assert "| norms: sandwich | 950,000 | 4,096 | 0 | stopped at step 3 |  |  |  |" in text
    assert "lstm" in text.split("Not run at these FLOPs: `neural_ngram`, `rnn`, ")[1]
    assert "lstm" not in text.split("Not run")[0]
    assert "norms: post" not in text.split("Not run")[1]


def test_the_depth_table_tells_who_stopped_and_the_largest_gradient():
    options = {"group": "depth", "budget": 2e11}
    lines = [line("transformer", 2.0), line("post", 3.0, rate=0.1, **options), line("pre", 2.5, rate=0.1, **options)]
    lines.append(line("pre", 2.25, rate=0.5, **options))
    stopped = line("deep", 0, rate=0.1, stopped="step 7: the loss is nan over 2048 tokens", **options)
    del stopped["bits_per_byte"]
    stopped["largest_grad_norm"] = None
    other = line("pre", 9.0, rate=0.5, seed=1, **options)  # the heading names the first seed alone
    table = architectures.tables([*lines, stopped, other])["depth"]
    assert table[0] == "2e+11 training FLOP a row; 2026-11-21, torch 2.13.0; seed 0."
    assert table[2] == "| norms | rate 0.1 | rate 0.5 |"
    assert table[4:] == [
        "| `post` | 3.000 (gradient up to 1.5) | not run |",
        "| `pre` | 2.500 (gradient up to 1.5) | 2.250 (gradient up to 1.5) |",
        "| `deep` | step 7 (gradient up to inf) | not run |",
    ]


@pytest.mark.parametrize("stem", sorted(path.stem for path in (ROOT / "docs").glob("architectures*.jsonl")))
def test_the_page_shows_what_the_file_says(stem):
    page = (ROOT / "docs" / "architectures.md").read_text()
    lines = architectures.read_lines(ROOT / "docs" / f"{stem}.jsonl")
    assert architectures.with_tables(page, stem, lines) == page
    changed = [row | {"bits_per_byte": row.get("bits_per_byte", 1) + 0.01} for row in lines]
    assert architectures.with_tables(page, stem, changed) != page
    with pytest.raises(SystemExit, match=f"the page has no <!-- table of {stem} -->"):
        architectures.with_tables("# Architectures", stem, lines)


def test_a_row_that_fails_costs_no_other_its_line(tmp_path, monkeypatch, capsys):
    def run_row(row, vocab_size, runs):
        if row["row"] == "rnn":
            raise RuntimeError("--train rnn.yaml ended with 1")
        return {key: row[key] for key in architectures.KEYS if key in row}

    monkeypatch.setattr(architectures, "run_row", run_row)
    monkeypatch.setattr(architectures, "prepare", lambda args: 768)
    command = ["x", "--rows", "rnn,lstm,gru", "--seeds", "0", "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"1 of 3 rows failed \(table rnn 0 20000000000000.0\)"):
        architectures.main()
    assert "--train rnn.yaml ended with 1" in capsys.readouterr().err
    assert [row["row"] for row in architectures.read_lines(tmp_path / "out.jsonl")] == ["lstm", "gru"]
    monkeypatch.setattr(architectures, "run_row", lambda row, *_: {"row": row["row"]})
    architectures.main()  # what failed, again, and nothing else
    assert [row["row"] for row in architectures.read_lines(tmp_path / "out.jsonl")] == ["lstm", "gru", "rnn"]


def test_a_row_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(SystemExit, match=r"--rows lstn: no such row or group. There are .*counted, .*lstm, "):
        planned("lstn,rnn")


@pytest.mark.slow
def test_a_run_goes_on_where_the_file_ends(tmp_path):
    from lmkit.data.shards import write_shards
    from lmkit.tokenization.train import train_tokenizer

    documents = ["the owl had a drum and the fox had a bell " * 60] * 20
    tokenizer = train_tokenizer(lambda: documents, vocab_size=384, allow_smaller_vocab=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        write_shards(documents, tokenizer, tmp_path / "shards" / split, 1)
    flags = ["--tokenizer", tmp_path / "tokenizer", "--shards", tmp_path / "shards", "--output", tmp_path / "out.jsonl"]
    flags += ["--budget", "2.8e11", "--seeds", "0", "--rows", "kneser_ney_5,transformer"]
    command = [sys.executable, str(ROOT / "benchmarks" / "architectures.py"), *map(str, flags)]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    found = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == ["kneser_ney_5", "transformer"]
    assert all(0 < row["bits_per_byte"] < 8 for row in found)
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
