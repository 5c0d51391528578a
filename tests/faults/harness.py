"""Stages as cheap children: a server that has imported everything forks one for each attempt, to be killed at will."""

import gzip
import importlib
import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from lmkit.artifact import verify
from lmkit.config import StageConfig, load, to_yaml
from lmkit.errors import CorruptInput
from lmkit.rounds import CHAIN
from lmkit.stage import read_record
from lmkit.tracking import read_jsonl

ROOT = Path(__file__).parents[2]
TALES = ROOT / "data" / "tales"
# Imported once by the server: what makes a stage's start take seconds.
PRELOAD = ["trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "transformers.models.qwen3.modeling_qwen3"]
PRELOAD += ["transformers.models.auto.modeling_auto", "torch.distributed.checkpoint.state_dict", "lmkit.rl.trainer"]
PRELOAD += ["lmkit.evaluation.compare", "lmkit.data.encode", "lmkit.data.sources", "lmkit.models.ngram", "datasets"]
HIDDEN = (".staging-", ".replaced-", ".trash-")
ARTIFACTS = ("tokenizer", "shards", "model", "data", "value", "results")
SAVES = ("pretrain", "sft", "reward", "ppo")  # stages with checkpoints


def serve():
    """The context whose processes are forked from the server."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_stage(stage, argv, log, hook=None, environment=()):
    """In a child: `python recipes/STAGE.py ARGV` with its output in `log`, after `hook()`."""
    os.setsid()
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.argv = [f"recipes/{stage}.py", *map(str, argv)]
    if hook is not None:
        hook()
    recipe = importlib.import_module(stage)
    from lmkit.stage import run

    run(recipe.main, config_class(recipe), recipe.__doc__)


def config_class(recipe):
    return next(
        value
        for value in vars(recipe).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == recipe.__name__
    )


class Harness:
    """Starts stages of the reference chain in `folder`, again and again, in directories of their own."""

    def __init__(self, folder):
        self.context, self.folder, self.seconds, self.numbers = serve(), Path(folder), {}, 0
        self.random = random.Random(int(os.environ.get("FAULTS_SEED", 0)))

    def fresh(self, stage):
        self.numbers += 1
        return self.folder / f"{stage}-{self.numbers}" / stage

    def start(self, stage, directory, *flags, hook=None, environment=None):
        """A child that runs the stage as the reference did, but in `directory`."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        log = self.folder / "logs" / f"{str(directory)[1:].replace('/', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        argv = ["--config", self.folder / "configs" / f"{stage}.yaml", "--output_dir", directory, *flags]
        child = self.context.Process(target=run_stage, args=(stage, argv, log, hook, environment or {}))
        child.log = log
        child.start()
        return child

    def run(self, stage, directory, *flags, **options):
        """Exit code and output of one undisturbed attempt."""
        child = self.start(stage, directory, *flags, **options)
        before = child.log.stat().st_size if child.log.exists() else 0
        child.join(180)
        if child.is_alive():
            child.kill()
            raise AssertionError(f"{stage} hangs: {child.log.read_text()[-2000:]}")
        return child.exitcode, child.log.read_bytes()[before:].decode(errors="replace")

    def make_chain(self, stages=CHAIN):
        """The reference: every stage (or some, from the first) once, undisturbed."""
        import rlhf

        warm = self.context.Process(target=int)  # the first child waits for the imports
        warm.start()
        warm.join()
        write_data(self.folder)
        config = load(rlhf.RLHFConfig, ["--config", str(write_chain(self.folder))])
        (self.folder / "configs").mkdir()
        for stage in stages:
            section = config.section(stage)
            (self.folder / "configs" / f"{stage}.yaml").write_text(to_yaml(section))
            started = time.monotonic()
            code, output = self.run(stage, section.output_dir)
            assert code == 0, output
            self.seconds[stage] = time.monotonic() - started

    def reference(self, stage):
        return self.folder / "chain" / stage

    def assert_same(self, stage, directory):
        """The artifacts are the reference's, byte for byte."""
        wanted, found = (read_record(path)["artifacts"] for path in (self.reference(stage), directory))
        assert found == wanted, f"{directory} differs from the run that was never stopped"
        for artifact, manifest_id in wanted.items():
            assert verify(directory / artifact) == manifest_id


def write_data(folder):
    """A corpus of a few tales, demonstrations and prompts."""
    text = gzip.decompress((TALES / "text.validation.txt.gz").read_bytes()).decode().split("\n\n")
    (folder / "train.txt").write_text("\n\n".join(text[:60]))
    (folder / "validation.txt").write_text("\n\n".join(text[60:64]))
    for name, count in (("sft", 24), ("sft.validation", 4), ("prompts.train", 12), ("prompts.heldout", 4)):
        with gzip.open(TALES / f"{name}.jsonl.gz", "rt") as file:
            (folder / f"{name}.jsonl").write_text("".join(line for _, line in zip(range(count), file)))


def write_chain(folder):
    """A chain file of stages that take a second or two, and save at every step or second step."""
    path = folder / "chain.yaml"
    path.write_text(f"""
name: chain
runs_dir: {folder}
tokenizer: {{corpus: {folder}/train.txt, validation: {folder}/validation.txt, vocab_size: 512, num_processes: 2}}
pretrain:
  model: {{preset: nano, context_length: 256}}
  train: {{max_steps: 12, warmup_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, eval_steps: 6,
    save_steps: 2}}
  validation_tokens: 500
sft:
  data: {folder}/sft.jsonl
  eval_data: {folder}/sft.validation.jsonl
  train: {{max_steps: 8, per_device_train_batch_size: 4, logging_steps: 1, eval_steps: 4, save_steps: 2}}
preferences:
  prompts: {folder}/prompts.train.jsonl
  num_pairs: 24
  labeler: tests.faults.labels:spelling
  max_new_tokens: 12
  batch_size: 8
  heldout_fraction: 0.3
reward:
  train: {{num_train_epochs: 1, max_steps: 8, per_device_train_batch_size: 2, eval_steps: 8, save_steps: 2,
    logging_steps: 1}}
ppo:
  prompts: {folder}/prompts.train.jsonl
  eval_prompts: {folder}/prompts.heldout.jsonl
  num_eval_prompts: 4
  train:
    total_episodes: 40
    rollout_batch_size: 8
    max_new_tokens: 10
    eval_steps: 5
    save_steps: 1
    guard_min_eos_rate: null
    guard_min_entropy: null
evaluation: {{prompts: {folder}/prompts.heldout.jsonl, num_prompts: 4, best_of: 2, max_new_tokens: 10}}
""")
    return path


# ------------------------------------------------------------------------------------- hooks, called in the child


def on_event(react, event, args):
    """An audit hook: calls `react(path)` when a folder in the making is made, renamed or written to."""
    if event in ("os.remove", "os.rmdir"):  # inside a folder that goes; its own name is not in the path
        react(event, str(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.chmod", "shutil.rmtree", "open"):
        path = str(args[0])
        if any(mark in path for mark in (*HIDDEN, "MANIFEST", ".json.tmp")):
            react(event, path)


def announce(connection):
    """Tells the parent when a save begins and when it became visible."""

    def react(event, path):
        name = os.path.basename(path)
        if name.startswith(".staging-") and event in ("os.mkdir", "os.rename"):
            connection.send_bytes(event.encode())

    sys.addaudithook(partial(on_event, react))


def kill_at(number):
    """SIGKILLs this process before the `number`-th event of its saves."""
    count = 0

    def react(event, path):
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(partial(on_event, react))


# ----------------------------------------------------------------------------------------------- what is on the disk


def visible(directory):
    """Folders that a reader would take for finished: artifacts and checkpoints."""
    artifacts = [folder for name in ARTIFACTS if (folder := directory / name).is_dir()]
    return artifacts + [f for f in (directory / "checkpoints").glob("*/") if not f.name.startswith(".")]


def broken(directory):
    """Visible folders that do not verify, each with the reason."""
    found = []
    for folder in visible(directory):
        try:
            verify(folder)
        except CorruptInput as error:
            found.append(str(error))
    return found


def torn(directory):
    """Whether a save was cut off in the middle."""
    return any(
        path.name.startswith(HIDDEN) for path in [*directory.glob(".*"), *(directory / "checkpoints").glob(".*")]
    )


def newest_step(directory):
    steps = sorted(int(path.name.split("-")[1]) for path in (directory / "checkpoints").glob("step-*"))
    return steps[-1] if steps else 0


def last_logged(directory):
    rows = read_jsonl(directory / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
