"""The chain as a person runs it: by subprocess, at nano size, then again, then with parts missing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rlhf
from safetensors.torch import load_file

from lmkit.config import load, to_yaml, validate
from lmkit.errors import BadInput
from lmkit.rounds import CHAIN
from lmkit.stage import read_record
from lmkit.strict_yaml import read_mapping

ROOT = Path(__file__).resolve().parents[2]
CHAIN_FILES = sorted((ROOT / "recipes" / "configs").rglob("rlhf.yaml"))


def run(*flags, **environment):
    command = [sys.executable, "recipes/rlhf.py", *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=220, check=False
    )


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The runs directory of a finished nano chain, what it printed, and a line on where its time went."""
    runs = tmp_path_factory.mktemp("runs")
    started = time.perf_counter()
    process = run("--config", "recipes/configs/nano/rlhf.yaml", "--runs_dir", runs)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    wall = time.perf_counter() - started
    work = sum(read_record(runs / "nano" / stage)["seconds"] for stage in CHAIN)
    return runs, process.stdout, f"nano chain: {wall:.0f} s, of which {wall - work:.0f} s start-up"


def flags(runs):
    return "--config", "recipes/configs/nano/rlhf.yaml", "--runs_dir", runs


def test_the_chain_prints_each_command_and_leaves_the_promised_results(nano, capsys):
    runs, printed, spent = nano
    with capsys.disabled():
        print(f"\n{spent}")
    for number, stage in enumerate(CHAIN, 1):
        assert f"[{number}/7]" in printed
        assert f"recipes/{stage}.py --config {runs}/nano/configs/{stage}.yaml" in printed
        assert json.loads((runs / "nano" / stage / "exit.json").read_text())["code"] == 0
    metrics = json.loads((runs / "nano" / "evaluation" / "results" / "metrics.json").read_text())
    models = {"base", "sft", "best_of_2", "ppo"}
    wanted = {f"{kind}/{model}" for kind in ("gold", "length", "eos_rate") for model in models}
    wanted |= {"win_rate/ppo_vs_sft", "win_rate/ppo_vs_sft_low", "win_rate/ppo_vs_sft_high", "kl/ppo"}
    wanted |= {f"bits_per_byte/{model}" for model in ("base", "sft", "ppo")}
    assert wanted <= set(metrics)
    report = (runs / "nano" / "report.html").read_text()
    assert "synthetic" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (runs / "nano" / "report.md").stat().st_size > 1000
    assert list((runs / "nano" / "plots").glob("*.png"))


def test_a_second_run_skips_every_stage_quickly(nano):
    started = time.perf_counter()
    again = run(*flags(nano[0]))
    assert again.returncode == 0
    assert again.stdout.count("finished already, skipped") == len(CHAIN)
    assert time.perf_counter() - started < 20


def test_models_load_without_lmkit_and_give_the_same_logits(nano):
    """A process that cannot import lmkit loads each model; its logits equal those of the weights in the file."""
    runs, *_ = nano
    code = (
        "import json, sys; sys.modules['lmkit'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer\n"
        "classes = {'lm': AutoModelForCausalLM, 'score': AutoModelForSequenceClassification}\n"
        "for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    model, info = classes[kind].from_pretrained(folder, output_loading_info=True)\n"
        "    ids = AutoTokenizer.from_pretrained(folder)('The fox and the map', return_tensors='pt').input_ids\n"
        "    problems = {k: str(v) for k, v in info.items() if v}\n"
        "    print(json.dumps([model.eval()(input_ids=ids).logits.double().sum().item(), problems]))\n"
    )
    kinds = {
        "pretrain/model": "lm",
        "sft/model": "lm",
        "ppo/model": "lm",
        "reward/model": "score",
        "ppo/value": "score",
    }
    words = [word for folder, kind in kinds.items() for word in (str(runs / "nano" / folder), kind)]
    process = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd="/", check=True)
    lines = process.stdout.splitlines()[-len(kinds) :]
    for (folder, kind), (total, problems) in zip(kinds.items(), map(json.loads, lines), strict=True):
        assert problems == {}
        assert total == pytest.approx(logits_here(runs / "nano" / folder, kind), abs=1e-9)


def logits_here(path, kind):
    from transformers import AutoTokenizer

    from lmkit.models.load import load_language_model, load_reward_model

    model = (load_language_model if kind == "lm" else load_reward_model)(path)[0].eval()
    ids = AutoTokenizer.from_pretrained(path)("The fox and the map", return_tensors="pt").input_ids
    return model(input_ids=ids).logits.double().sum().item()


def test_a_deleted_stage_is_redone_to_the_same_bytes_and_what_follows_is_skipped(nano, tmp_path):
    runs = tmp_path / "copy"
    shutil.copytree(nano[0], runs)
    shutil.rmtree(runs / "nano" / "sft")
    before = load_file(nano[0] / "nano" / "sft" / "model" / "model.safetensors")
    again = run(*flags(runs))
    assert again.returncode == 0, again.stderr[-2000:]
    after = load_file(runs / "nano" / "sft" / "model" / "model.safetensors")
    assert all(before[name].equal(after[name]) for name in before)
    assert "[3/7]" in again.stdout
    assert again.stdout.count("finished already, skipped") == len(CHAIN) - 1


def test_another_setting_is_refused_by_name_and_redo_keeps_the_old_one(nano, tmp_path):
    runs = tmp_path / "copy"
    shutil.copytree(nano[0], runs)
    refused = run(*flags(runs), "--evaluation.num_prompts", 12)
    assert refused.returncode == 2
    assert "num_prompts: 16, now 12" in refused.stderr
    assert "--redo evaluation" in refused.stderr
    redone = run(*flags(runs), "--evaluation.num_prompts", 12, "--redo", "evaluation")
    assert redone.returncode == 0, redone.stderr[-2000:]
    assert read_record(runs / "nano" / "evaluation.old-1")["config"]["num_prompts"] == 16
    assert read_record(runs / "nano" / "evaluation")["config"]["num_prompts"] == 12


def test_ctrl_c_stops_the_chain_and_the_same_command_goes_on(tmp_path):
    """The terminal's signal reaches rlhf.py, which passes it on; the stage is not finished, 75 is the answer."""
    command = [sys.executable, "recipes/rlhf.py", *map(str, flags(tmp_path)), "--to", "tokenizer"]
    chain = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in chain.stdout:
        if "[1/7]" in line:
            break
    while not (tmp_path / "nano" / "tokenizer" / "plan.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    chain.send_signal(signal.SIGINT)
    _, stderr = chain.communicate(timeout=30)
    assert chain.returncode == 75
    assert "To go on:" in stderr
    assert read_record(tmp_path / "nano" / "tokenizer") is None
    again = run(*flags(tmp_path), "--to", "tokenizer")
    assert again.returncode == 0, again.stderr


def test_mistakes_of_all_sections_are_listed_before_anything_starts(tmp_path):
    process = run("--runs_dir", tmp_path, "--pretrain.train.learning_rte", 1, "--sft.train.learning_rte", 1,
                  "--ppo.train.kl_coef", "high", "--nme", "x")  # fmt: skip
    assert process.returncode == 2
    for line in (
        "pretrain.train.learning_rte",
        "sft.train",
        "ppo.train.kl_coef",
        "nme  unknown option. Did you mean name?",
    ):
        assert line in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--to", "rewards"], "rewards is not a stage"),
        (["--launch", "{pppo: x.yaml}"], "pppo is not a stage"),
        (["--sft.data", "no/such.jsonl"], r"sft.data: no/such.jsonl does not exist"),
        (["--tokenizer.corpus", "no/such.txt"], r"tokenizer.corpus: no/such.txt does not exist"),
        (["--only", "ppo"], "does not exist"),
        (["--name", "../x"], "String should match pattern"),
    ],
)
def test_what_cannot_work_starts_nothing(tmp_path, given, said):
    process = run("--runs_dir", tmp_path, *given)
    assert process.returncode == 2
    assert said in process.stderr
    assert not list(tmp_path.iterdir())


def test_a_launcher_with_several_processes_is_refused():
    process = run("--dry_run", WORLD_SIZE="2")
    assert process.returncode == 2
    assert "plain python" in process.stderr


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    process = run("--runs_dir", tmp_path, "--dry-run", "--launch", "{tokenizer: accelerate_configs/cpu.yaml}")
    assert process.returncode == 0
    assert "tokenizer: would run" in process.stdout
    assert "accelerate.commands.launch --config_file accelerate_configs/cpu.yaml" in process.stdout
    assert "ppo: would run, unless what it reads comes out unchanged" in process.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", CHAIN_FILES, ids=lambda file: file.parent.name)
def test_every_chain_file_is_valid(file):
    config = load(rlhf.RLHFConfig, ["--config", str(file)])
    assert config.name == file.parent.name
    for stage in CHAIN:
        section = config.section(stage)
        assert section.output_dir == Path("runs") / config.name / stage
        assert validate(type(section), read_mapping_of(section)) == section


def read_mapping_of(section):
    import yaml

    return yaml.safe_load(to_yaml(section))


def test_there_are_chain_files():
    assert {file.parent.name for file in CHAIN_FILES} >= {"nano", "tiny", "small"}


def test_every_recipes_defaults_are_tiny():
    config = load(rlhf.RLHFConfig, ["--config", "recipes/configs/tiny/rlhf.yaml"])
    for stage in CHAIN:
        section = config.section(stage)
        assert section == type(section)()


def test_paths_follow_the_name_unless_they_are_given():
    assert read_mapping(ROOT / "recipes/configs/tiny/rlhf.yaml")["name"] == "tiny"
    config = load(rlhf.RLHFConfig, ["--name", "mine", "--seed", "7", "--sft.model", "runs/tiny/pretrain/model"])
    assert config.section("sft").model == Path("runs/tiny/pretrain/model")
    assert config.section("reward").model == Path("runs/mine/sft/model")
    assert config.section("ppo").seed == 7
    with pytest.raises(BadInput, match="given twice"):
        load(rlhf.RLHFConfig, ["--sft", "{data: a, data: b}"])


def sections(*flags):
    config = load(rlhf.RLHFConfig, ["--name", "r", "--rounds", "3", *flags])
    return {name: config.section(name) for name in rlhf.stages_of(config.rounds)}


def test_a_round_starts_from_the_one_before():
    found = sections()
    at = {name: str(section.output_dir) for name, section in found.items()}
    assert at == {name: f"runs/r/{name}" for name in found}
    assert list(found)[3:] == [
        f"{stage}{n}" for n in ("", "-2", "-3") for stage in ("preferences", "reward", "ppo")
    ] + ["evaluation"]
    assert str(found["preferences"].model) == "runs/r/sft/model"
    assert str(found["preferences-3"].model) == "runs/r/ppo-2/model"
    assert str(found["reward-2"].model) == "runs/r/reward/model"
    assert str(found["reward-3"].model) == "runs/r/reward-2/model"
    assert str(found["reward-3"].data) == "runs/r/preferences-3/data"
    assert str(found["ppo-2"].model) == "runs/r/ppo/model"
    assert str(found["ppo-2"].reward) == "runs/r/reward-2/model"
    assert str(found["evaluation"].sft) == "runs/r/sft/model"
    assert str(found["evaluation"].ppo) == "runs/r/ppo-3/model"
    assert str(found["evaluation"].reward) == "runs/r/reward-3/model"
    one = load(rlhf.RLHFConfig, ["--name", "r"])
    for stage in CHAIN[:6]:
        assert one.section(stage) == found[stage]


def test_a_list_of_the_runs_own_models_moves_with_it_and_need_not_be_there_yet(tmp_path, capsys):
    ensemble = "[<run>/reward/model, <run>/reward/members/1/model, my_rewards:politeness]"
    found = sections("--ppo.reward", ensemble)
    members = ["model", "members/1/model"]
    assert found["ppo"].reward == [*(f"runs/r/reward/{name}" for name in members), "my_rewards:politeness"]
    assert found["ppo-2"].reward == [*(f"runs/r/reward-2/{name}" for name in members), "my_rewards:politeness"]
    flags = ["--runs_dir", str(tmp_path), "--dry-run", "--ppo.reward", ensemble]
    rlhf.main(load(rlhf.RLHFConfig, flags))
    assert "ppo: would run" in capsys.readouterr().out


def test_a_round_keeps_the_paths_that_are_given_and_trains_no_second_judge():
    found = sections("--ppo.model", "runs/other/sft/model", "--reward.judge_dir", "runs/r/judge")
    assert str(found["ppo-2"].model) == "runs/other/sft/model"
    assert found["reward"].judge_dir == Path("runs/r/judge")
    assert found["reward-2"].judge_dir is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preferences.data", "pairs.jsonl"], "rounds 3 and preferences.data"),
        (["--reward.center_on", "samples"], "rounds 3 and center_on"),
    ],
)
def test_rounds_that_cannot_be_are_refused(flags, message):
    with pytest.raises(BadInput, match=message):
        sections(*flags)


def test_stages_of_later_rounds_are_named_like_others(tmp_path, capsys):
    flags = ["--runs_dir", str(tmp_path), "--rounds", "2", "--dry-run"]
    rlhf.main(load(rlhf.RLHFConfig, ["--config", "recipes/configs/nano/rlhf.yaml", *flags, "--to", "reward-2"]))
    said = capsys.readouterr().out
    assert "reward-2: would run" in said
    assert "ppo-2" not in said
    with pytest.raises(BadInput, match=r"ppo-3 is not a stage. The stages are .*ppo-2, evaluation"):
        rlhf.main(load(rlhf.RLHFConfig, [*flags, "--redo", "ppo-3"]))


@pytest.mark.slow
def test_a_second_round_goes_on_from_the_first_and_is_finished_like_it(nano, tmp_path):
    runs = tmp_path / "copy"
    shutil.copytree(nano[0], runs)
    again = run(*flags(runs), "--rounds", 2)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert again.stdout.count("finished already, skipped") == 6
    assert "[7/10]" in again.stdout
    assert "evaluation: to be made again (what it reads has changed)" in again.stdout
    kl = json.loads((runs / "nano" / "ppo-2" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(kl.get("eval/kl", kl.get("objective/kl"))) < 1e-4, "the reference is the policy of the first round"
    assert read_record(runs / "nano" / "evaluation")["inputs"]["ppo"]["path"].endswith("ppo-2/model")
    assert "Rounds" in (runs / "nano" / "report.md").read_text()
    last = run(*flags(runs), "--rounds", 2)
    assert last.stdout.count("finished already, skipped") == 10
    lmkit = [sys.executable, "-c", "from lmkit.cli import app; app()"]
    for command, expected in (("status", "reward-2"), ("verify", "ppo-2/model")):
        shown = subprocess.run([*lmkit, command, str(runs / "nano")], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert expected in shown.stdout
    changed = run(*flags(runs), "--rounds", 2, "--ppo.train.kl_coef", 0.5, "--from", "ppo-2", "--redo", "ppo-2")
    assert changed.returncode == 0, changed.stderr[-2000:]
    assert (runs / "nano" / "ppo-2.old-1").is_dir()
    shown = subprocess.run([*lmkit, "status", str(runs / "nano")], capture_output=True, text=True)
    assert "old" not in shown.stdout
