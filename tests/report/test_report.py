import json
import math
import re
import shlex

import pytest

from lmkit.config import parse_flags
from lmkit.report.blocks import to_html, to_markdown
from lmkit.report.plots import PLOTS, frontier, reward_calibration
from lmkit.report.read import read_run, series
from lmkit.report.report import content, disputed, write_report
from tests.report.example_run import MODELS, interval, write_jsonl, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "full")
    write_report(run)
    return run


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def text_of(run):
    """The report as Markdown, without its pictures, which take the time."""
    return to_markdown("run", list(content(read_run(run), {})), run)


def row_of(text, label):
    """Cells of the first table row that starts with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# ------------------------------------------------------------------------------------------------------------- whole


def test_the_page_needs_nothing_but_itself(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(list((run / "plots").glob("*.png"))) > 15
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?:", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_pictures_are_png_files_that_the_markdown_links(run):
    linked = re.findall(r"\]\((plots/[^)]+)\)", (run / "report.md").read_text())
    assert sorted(linked) == sorted(p.relative_to(run).as_posix() for p in (run / "plots").iterdir())
    for name in linked:
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (run / name).stat().st_size > 5000, "not an empty picture"


def test_tables_hold_the_numbers_with_intervals(run):
    text = text_of(run)
    assert row_of(text, "")[:4] == ["base", "sft", "best_of_8", "ppo"]
    assert row_of(text, "gold score")[3] == "5.42 [5.22, 5.62]"
    assert row_of(text, "wins against SFT by gold")[1:] == ["-", "0.830 [0.780, 0.880]", "0.870 [0.825, 0.915]"]
    assert row_of(text, "KL from SFT (nats)")[2:] == ["1.20", "8.40 [8.10, 8.70]"]
    assert row_of(text, "bits per byte") == ["0.2210", "0.2432", "-", "0.2391"]
    assert row_of(text, "object")[-1] == "-0.160 (worse)"
    assert row_of(text, "animal")[-1] == "+0.140"
    assert "n = 192 prompts, one sample each at temperature 1, one training run" in text
    assert "gains 1.79 when the reward model chooses, and 2.11 when gold itself does" in text
    assert row_of(text, "5-gram, modified Kneser-Ney") == ["0.2630", "-"]
    assert row_of(text, "this model (256 tokens of context, stride 128)")[1] == "1.87"
    assert row_of(text, "this model (stride 256: no overlap)") == ["0.2400", "1.90"]
    assert row_of(text, "sft")[:3] == ["1:50", "9000", "0.70 GB"]


def test_warnings_and_what_is_synthetic_come_before_any_result(run):
    text = text_of(run)
    places = [text.index(part) for part in ("Preferences here are synthetic", "**Warnings**", "By gold, PPO is better")]
    assert places == sorted(places)
    assert "PPO is worse than SFT in the component object: 0.16 lower." in text


def test_the_same_prompts_stand_side_by_side(run):
    text = text_of(run)
    assert "The first 12 of 24 prompts, not chosen." in text
    assert text.count("- **best_of_8**") == 15, "12 and the 3 that are disputed"


# -------------------------------------------------------------------------------------------------------------- parts


def test_a_run_without_gold_has_no_rows_about_it_and_says_so(tmp_path):
    text = text_of(write_run(tmp_path / "run", gold=False))
    assert "gold" not in text.replace("gold on held-out", "")
    assert "No judge independent of the reward model" in text
    assert "Headroom" not in text
    assert "synthetic" not in text, "these preferences were given"
    assert row_of(text, "wins by the reward model")[3] == "0.930 [0.885, 0.975]"


def test_a_judge_model_takes_the_place_of_gold(tmp_path):
    run = write_run(tmp_path / "run", gold=False)
    results = run / "evaluation/results"
    edit(results / "metrics.json", lambda m: m.update({"judge": "judge", **interval("judge/ppo", 1.5, 0.1)}))
    rows = [json.loads(line) | {"judge": dict.fromkeys(MODELS, 1.5)} for line in (results / "samples.jsonl").open()]
    write_jsonl(results / "samples.jsonl", rows)
    text = text_of(run)
    assert row_of(text, "score by a judge model")[3] == "1.50 [1.40, 1.60]"
    assert "No judge independent" not in text


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6])
def test_a_partial_run_says_what_is_missing_and_shows_the_rest(tmp_path, stages):
    run = write_run(tmp_path / "run", stages=stages)
    drawn = [name for name, draw in PLOTS.items() if draw(read_run(run)) is not None]
    assert ("ppo_kl" in drawn) == ("frontier" in drawn) == (stages >= 6)
    assert ("reward_calibration" in drawn) == (stages >= 5)
    assert ("pretrain_bits_per_byte" in drawn) == (stages >= 2)
    text = text_of(run)
    assert "Not finished:" in text
    assert "nan" not in text


def test_a_stage_on_its_way_shows_its_curves_and_how_it_ended(tmp_path):
    run = write_run(tmp_path / "run", stages=3)
    (run / "sft" / "stage.json").unlink()
    (run / "sft" / "exit.json").write_text('{"code": 4, "reason": "the gradient of step 301 is not finite"}')
    assert PLOTS["sft_loss"](read_run(run)) is not None
    text = text_of(run)
    assert "sft ended with exit code 4: the gradient of step 301 is not finite" in text
    assert row_of(text, "sft")[0] == "not finished, 300 steps"


def test_an_empty_run_has_a_report(tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    page = write_report(tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    assert "No stage of this run is finished." in page.read_text()


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path):
    run = write_run(tmp_path / "run", stages=2)
    (run / "plots").mkdir()
    (run / "plots" / "old.png").write_bytes(b"")
    write_report(run)
    assert sorted(path.stem for path in (run / "plots").iterdir()) == [
        "pretrain_bits_per_byte",
        "pretrain_copying",
        "pretrain_loss",
    ]


# ------------------------------------------------------------------------------------------------------------- safety


HOSTILE = "<script>alert(1)</script> | [click](http://x.y) `a` *b* \n# heading \x1b[31m\x00"


def test_what_a_model_writes_stays_text(tmp_path):
    run = write_run(tmp_path / "run")
    samples = [json.loads(line) for line in (run / "evaluation/results/samples.jsonl").open()]
    samples[0] |= {"ppo": HOSTILE, "prompt": [{"role": "user", "content": HOSTILE}]}
    write_jsonl(run / "evaluation/results/samples.jsonl", samples)
    text, page = text_of(run), to_html("run", list(content(read_run(run), {})))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in text.replace("\\<script", "")
    assert "](http" not in text
    assert "\n# heading" not in text
    assert "user: " in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text + page)


def test_numbers_that_are_not_finite_are_shown_and_warned_of(tmp_path):
    run = write_run(tmp_path / "run", stages=2)
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "seconds": 1, "loss": "nan", "eval/bits_per_byte": "inf"}\n')
    edit(run / "pretrain/stage.json", lambda r: r["metrics"].update({"eval/bits_per_byte": "inf"}))
    text = text_of(run)
    assert "pretrain: eval/bits_per_byte, loss had values that are not finite" in text
    assert row_of(text, "this model (256 tokens of context, stride 128)")[0] == "inf"


# -------------------------------------------------------------------------------------------------------- provenance


def test_the_commands_give_the_recorded_configuration_back(tmp_path):
    run = write_run(tmp_path / "run", stages=2)
    config = {"output_dir": "runs/a b", "data": None, "train": {"lr": 1e-4, "names": ["x", "y'z"]}, "bf16": True}
    edit(run / "pretrain/stage.json", lambda r: r.update(full_config=config))
    command = next(line for line in text_of(run).splitlines() if line.startswith("python recipes/pretrain.py"))
    assert parse_flags(shlex.split(command)[2:]) == config
    (run / "configs").mkdir()
    (run / "configs/pretrain.yaml").write_text(json.dumps(config))
    assert f"python recipes/pretrain.py --config {run}/configs/pretrain.yaml" in text_of(run)
    (run / "configs/pretrain.yaml").write_text("{seed: 3}")
    assert command in text_of(run), "a file that says something else is not offered"


def test_versions_and_commit_are_listed(run):
    text = text_of(run)
    assert "git checkout 0123456789abcdef0123456789abcdef01234567" in text
    assert "torch 2.13.0" in text


# ----------------------------------------------------------------------------------------------------------- pictures


def test_the_frontier_shows_gains_over_the_square_root_of_kl(run):
    data = read_run(run)
    lines = {line.get_label(): line.get_xydata() for line in frontier(data).axes[0].get_lines()}
    kl, gold = series(data.rows("ppo"), "eval/kl")[1], series(data.rows("ppo"), "eval/gold")[1]
    during = lines["gold, during PPO"]
    assert during[:, 0].tolist() == pytest.approx([math.sqrt(value) for value in kl])
    assert during[:, 1].tolist() == pytest.approx([value - gold[0] for value in gold])
    assert lines["gold, final evaluation"].tolist() == [pytest.approx([math.sqrt(8.4), 5.42 - 3.29])]
    best = lines["gold, best of n"]
    assert best[:, 0].tolist() == pytest.approx([math.sqrt(math.log(n) - (n - 1) / n) for n in (1, 2, 4, 8)])
    assert best[:, 1].tolist() == pytest.approx([0, 0.73, 1.34, 1.79])


def test_the_reliability_diagram_shows_the_bins(run):
    data = read_run(run)
    bins = data.metrics("reward")["calibration"]
    line = next(line for line in reward_calibration(data).axes[0].get_lines() if line.get_marker() == "o")
    assert line.get_xydata().tolist() == [[b["confidence"], b["accuracy"]] for b in bins]


def test_a_reward_model_shows_its_worst_pairs_its_ensemble_and_what_noise_hides(tmp_path):
    run = write_run(tmp_path / "run")
    wrong = {"prompt": "Tell of a <goat>.", "chosen": "Kind it was.", "rejected": "Mean it was."}
    measured = {"accuracy_noiseless": 0.912, "member_agreement": 0.873, "accuracy_members_mean": 0.755}
    measured["most_wrong"] = [wrong | {"score": {"chosen": -1.25, "rejected": 2.5}}]
    edit(run / "reward/stage.json", lambda record: record["metrics"].update(measured))
    text = text_of(run)
    assert "as the labeler's scores without noise do in 0.912" in text
    assert "order a pair alike in 0.873; the mean of all their scores has the accuracy 0.755" in text
    assert "**Tell of a \\<goat>.**" in text
    assert "- **chosen** score -1.25: Kind it was.\n- **rejected** score 2.50: Mean it was." in text


def test_curated_prompts_have_their_table(tmp_path):
    run = write_run(tmp_path / "run")
    assert "Curated prompts" not in text_of(run)
    cluster = {"cluster": 0, "size": 7, "chosen": 3, "distance": 0.418, "typical": "Tell of a | goat."}
    counts = {"num_prompts": 12, "num_exact_duplicates": 3, "num_near_duplicates": 2, "num_chosen": 3}
    (run / "curation").mkdir()
    found = {"source": "prompts.jsonl", **counts, "clusters": [cluster]}
    (run / "curation/clusters.json").write_text(json.dumps(found))
    text = text_of(run)
    assert "Of 12 prompts in prompts.jsonl, 3 were exact and 2 near duplicates; 3 were chosen" in text
    assert "| 0 | 7 | 3 | 0.42 | Tell of a \\| goat. |" in text


def test_the_most_disputed_answers_are_those_ranked_most_differently():
    ranks = [(1, 1), (2, 3), (3, 4), (4, 5), (5, 2)]
    samples = [{"score": {"ppo": a}, "gold": {"ppo": b}} for a, b in ranks]
    assert disputed(samples, "gold")[0] is samples[4]
