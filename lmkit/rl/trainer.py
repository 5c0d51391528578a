"""PPO on the plain Hugging Face stack: rollout -> score -> advantages -> epochs x mini-batches x micro-batches.

    trainer = PPOTrainer(model, reward="runs/tiny/reward/model", args=PPOConfig(...), train_dataset=rows,
                         processing_class=tokenizer, output_dir=Path("runs/mine/ppo"))
    trainer.train()
    trainer.save_model(folder)

Everything random is derived from the seed, the iteration and the purpose (prompts, sampling, shuffling), so a
checkpoint needs no generator's state, and a resumed run takes the same bits as one never stopped (CPU).
"""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.data.order import shuffled
from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.generation.sampler import sample
from lmkit.models.heads import ValueHead, classifier_from, value_model_from
from lmkit.rl.actor_critic import ActorCritic, check_policy, disable_dropout, target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.kl import adapted_kl_coef
from lmkit.rl.metrics import explained_variance, guard, rollout_metrics, warnings
from lmkit.rl.rewards import Batch, make_reward
from lmkit.rl.rollout import Rollout, collect, completion_ids
from lmkit.rl.update import advantages_and_returns, make_optimizer, update
from lmkit.stage import latest_checkpoint, rotate
from lmkit.tokenization.chat import render, stop_token_ids
from lmkit.tracking import Tracker
from lmkit.training import checkpoint
from lmkit.training.loop import make_accelerator
from lmkit.training.optimizers import schedule

NUM_SAMPLES = 4  # completions kept in samples.jsonl at each evaluation
STATE = ("iteration", "kl_coef", "metrics", "samples")  # what a checkpoint holds besides tensors
EVALUATED = {
    "eval/score": "objective/scores",
    "eval/kl": "objective/kl",
    "eval/completion_length": "rollout/completion_length_mean",
    "eval/eos_rate": "rollout/eos_rate",
    "eval/entropy": "policy/entropy_avg",
}


class PPOTrainer:
    """Trains `model` in place against a reward, held near a reference by a KL penalty.

    model: a causal language model; its dropout is set to 0.
    reward: a reward model, its directory, "module:function" or a function (prompts, completions, **columns) -> numbers.
    train_dataset, eval_dataset: rows with `prompt`, a text or a conversation; other columns reach the reward function.
    processing_class: the tokenizer.
    ref_model: what the KL is measured from; a frozen copy of `model` when not given.
    value_model: the critic where args.critic is "separate"; a copy of the reward model when not given.
    output_dir: metrics.jsonl, samples.jsonl and checkpoints/ are written there.
    evaluation: (rows, completions as texts) -> metrics, added to those of `evaluate`; rows are dicts of eval_dataset.
    stop_requested: asked after each iteration; once True a checkpoint is saved and Interrupted raised.
    say: takes lines meant for the user.

    Raises BadInput for what cannot work, before anything is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        reward: Any,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        output_dir: Path,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        value_model: PreTrainedModel | None = None,
        evaluation: Callable[[list[dict], list[str]], Mapping[str, float]] | None = None,
        seed: int = 0,
        report_to: Sequence[str] = (),
        stop_requested: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ):
        self.args, self.tokenizer, self.seed, self.output_dir = args, processing_class, seed, Path(output_dir)
        self.evaluation, self.report_to = evaluation, report_to
        self.accelerator = make_accelerator(args.bf16, model.config.get_text_config().hidden_size)
        self.stop_requested, self.say = stop_requested, say if self.accelerator.is_main_process else lambda text: None
        device = self.accelerator.device
        share, rest = divmod(args.rollout_batch_size, self.accelerator.num_processes)
        if rest or share < args.num_mini_batches:
            raise BadInput(
                f"rollout_batch_size {args.rollout_batch_size} does not divide among {self.accelerator.num_processes} "
                f"processes and {args.num_mini_batches} mini-batches; make it a multiple of the processes, at least "
                "num_mini_batches in each."
            )
        check_policy(model, "the policy")
        self.reference = (
            (copy.deepcopy(model) if ref_model is None else ref_model).requires_grad_(False).eval().to(device)
        )
        check_policy(self.reference, "the reference")
        self.actor_critic = ActorCritic(model, self._critic(model, reward, value_model))
        disable_dropout(self.actor_critic)
        self.model = self.accelerator.prepare_model(self.actor_critic)
        self.optimizer = make_optimizer(self.actor_critic, args)
        self.reward = make_reward(reward, processing_class, batch_size=args.generation_batch_size, device=device)
        self.stop_token_ids = stop_token_ids(processing_class)
        self.train_rows, self.train_prompts = self._prepare(train_dataset, "train_dataset")
        self.eval_rows, self.eval_prompts = self._prepare(eval_dataset, "eval_dataset") if eval_dataset else ([], [])
        self.iteration, self.kl_coef = 0, args.kl_coef
        self.metrics: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []

    def _critic(self, model, reward, value_model):
        if self.args.critic == "shared":
            if value_model is not None:
                raise BadInput("value_model is given and critic is shared; set critic to separate, or leave it out.")
            return ValueHead(model.config.get_text_config().hidden_size).to(model.device)
        if value_model is not None:
            return value_model.requires_grad_(True)
        if isinstance(reward, str | Path) and Path(reward).is_dir():
            from lmkit.models.load import load_reward_model

            return load_reward_model(Path(reward))[0]
        if isinstance(reward, PreTrainedModel):
            return value_model_from(reward)
        raise BadInput(
            "critic is separate, but the reward is no model to start it from; pass value_model or use shared."
        )

    def _prepare(self, dataset, name) -> tuple[Dataset, list[list[int]]]:
        if "prompt" not in dataset.column_names or not len(dataset):
            raise BadInput(
                f"{name} has {len(dataset)} rows of {dataset.column_names}; wanted rows with a column prompt."
            )
        prompts = [render(self.tokenizer, prompt)[0] for prompt in dataset["prompt"]]
        room = getattr(self.actor_critic.policy.config, "max_position_embeddings", None) or float("inf")
        long = [row for row, ids in enumerate(prompts) if len(ids) + self.args.max_new_tokens > room]
        if long:
            raise BadInput(
                f"{name}: {len(long)} of {len(prompts)} prompts leave no room for max_new_tokens "
                f"{self.args.max_new_tokens} in the model's {room} positions; the first is row {long[0]} with "
                f"{len(prompts[long[0]])} tokens. Remove or shorten them, or lower max_new_tokens."
            )
        return dataset, prompts

    def train(self, resume_from_checkpoint: bool | Path | None = None) -> dict[str, float]:
        """Runs all iterations that are left; the last row of metrics.

        resume_from_checkpoint: True for the newest checkpoint of output_dir that verifies, if there is one; or a path.
        Raises Stopped when a guard or a non-finite number ends the run, and Interrupted after `stop_requested`.
        """
        args = self.args
        if resume_from_checkpoint:
            self._load(resume_from_checkpoint)
        options = {"total_steps": args.num_iterations, "start_step": self.iteration, "accelerator": self.accelerator}
        with Tracker(self.output_dir, **options, report_to=self.report_to, description="ppo") as tracker:
            if self.iteration == 0 and self.eval_prompts:
                tracker.log(0, self.evaluate())
                tracker.sample(0, self.samples)
            warned: set[str] = set()
            while self.iteration < args.num_iterations:
                self.metrics, num_tokens = self._iterate()
                last = self.iteration == args.num_iterations
                for kind, text in warnings(self.metrics, self.accelerator).items():
                    if kind not in warned:
                        warned.add(kind)
                        self.say(f"warning: iteration {self.iteration}: {text}.")
                if last or self.iteration % args.eval_steps == 0:
                    self.metrics |= self.evaluate() if self.eval_prompts else {}
                    tracker.sample(self.iteration, self.samples)
                tracker.log(self.iteration, self.metrics, tokens=num_tokens)
                stop = self._any(self.stop_requested())
                if stop or last or self.iteration % args.save_steps == 0:
                    self._save()
                if stop and not last:
                    raise Interrupted(f"stopped after iteration {self.iteration} of {args.num_iterations}, saved.")
        return self.metrics

    def _iterate(self) -> tuple[dict[str, float], int]:
        """One iteration: rollout, advantages, updates. Returns its metrics and the number of tokens drawn."""
        args, accelerator, started = self.args, self.accelerator, time.perf_counter()
        index = self._rows_of_iteration()
        rollout, seconds = self.collect(self.train_rows, self.train_prompts, index, "sampling")
        metrics = rollout_metrics(rollout, args.missing_eos_penalty, self.kl_coef, accelerator)
        self.samples = self._table(rollout, self.train_rows, index)
        if broken := guard(metrics, args):
            raise Stopped(f"iteration {self.iteration + 1}: {broken}. {self._last_good()}")
        all_reduce = lambda tensor: accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu()  # noqa: E731
        advantages, returns = advantages_and_returns(rollout, args, self.kl_coef, all_reduce)
        before_updates = time.perf_counter()
        steps = args.num_ppo_epochs * args.num_mini_batches
        try:
            learnt = update(
                rollout,
                advantages,
                returns,
                model=self.model,
                optimizer=self.optimizer,
                config=args,
                rates=[self._rate(self.iteration * steps + step) for step in range(steps)],
                accelerator=accelerator,
                generator=self._generator("shuffle"),
            )
        except Stopped as error:
            raise Stopped(f"iteration {self.iteration + 1}: {error} {self._last_good()}") from None
        seconds["train"] = time.perf_counter() - before_updates
        if args.kl_target is not None:
            rule = {"target": args.kl_target, "num_episodes": args.rollout_batch_size, "horizon": args.kl_horizon}
            self.kl_coef = adapted_kl_coef(self.kl_coef, metrics["objective/kl"], **rule)
        self.iteration += 1
        metrics |= learnt | explained_variance(rollout, returns, accelerator)
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        num_tokens = round(metrics["rollout/completion_length_mean"] * args.rollout_batch_size)
        metrics["perf/episodes_per_second"] = args.rollout_batch_size / (time.perf_counter() - started)
        metrics["episode"] = self.iteration * args.rollout_batch_size
        return metrics, num_tokens

    def collect(
        self, rows: Dataset, prompts: list[list[int]], index: Sequence[int], purpose: str
    ) -> tuple[Rollout, dict[str, float]]:
        """A scored rollout of this process's prompts, and the seconds its parts took; `purpose` seeds the sampling."""
        args, device = self.args, self.accelerator.device

        def draw(chosen):
            options = {"max_new_tokens": args.max_new_tokens, "stop_token_ids": self.stop_token_ids}
            options |= {"temperature": args.temperature, "batch_size": args.generation_batch_size}
            with self.accelerator.autocast():
                return sample(self.actor_critic.policy, chosen, **options, generator=self._generator(purpose))

        def forward(*inputs):
            return self.model(*(tensor.to(device) for tensor in inputs), args.temperature, True)

        def ref_forward(*inputs):
            with self.accelerator.autocast():
                return (target_logprobs(self.reference, *(tensor.to(device) for tensor in inputs), args.temperature),)

        def score(completions):
            chosen = rows[list(index)]
            asked, texts = chosen.pop("prompt"), self.decode(completions)
            spoken = [t if isinstance(p, str) else [{"role": "assistant", "content": t}] for p, t in zip(asked, texts)]
            ids = [prompts[row] + completion for row, completion in zip(index, completions)]
            return self.reward(Batch(asked, spoken, ids, chosen))

        self.model.eval()
        chosen = [prompts[row] for row in index]
        return collect(chosen, draw, forward, ref_forward, score, args.per_device_train_batch_size)

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Completions as texts, without the stop token."""
        ends = [ids[:-1] if ids[-1] in self.stop_token_ids else ids for ids in completion_ids]
        return self.tokenizer.batch_decode(ends, skip_special_tokens=True)

    def evaluate(self) -> dict[str, float]:
        """Score, KL, length and ending of one completion for each row of eval_dataset, and what `evaluation` adds.

        Every evaluation draws with the same seed, so that two of them differ by the policy alone.
        """
        if not self.eval_prompts:
            raise BadInput("there is no eval_dataset to evaluate on; pass one to PPOTrainer.")
        accelerator = self.accelerator
        index = range(accelerator.process_index, len(self.eval_prompts), accelerator.num_processes)
        rollout, _ = self.collect(self.eval_rows, self.eval_prompts, index, "evaluation")
        self.samples = self._table(rollout, self.eval_rows, index)
        found = rollout_metrics(rollout, self.args.missing_eos_penalty, self.kl_coef, accelerator)
        metrics = {name: found[source] for name, source in EVALUATED.items()}
        if self.evaluation is not None:
            pairs = list(zip(index, self.decode(completion_ids(rollout))))
            pairs = gather_object(pairs) if accelerator.num_processes > 1 else pairs
            own = self.evaluation([self.eval_rows[row] for row, _ in pairs], [text for _, text in pairs])
            metrics |= {f"eval/{name}": value for name, value in own.items()}
        return metrics

    def _table(self, rollout: Rollout, rows: Dataset, index: Sequence[int]) -> list[dict[str, Any]]:
        """The first rows of a rollout for a person to read; kl is summed over the completion, in nats."""
        few = rollout.rows(torch.arange(min(NUM_SAMPLES, len(index))))
        kls = (few.logprobs - few.ref_logprobs).sum(1).tolist()
        columns = (
            rows[list(index[:NUM_SAMPLES])]["prompt"],
            self.decode(completion_ids(few)),
            few.scores.tolist(),
            kls,
        )
        names = ("prompt", "completion", "score", "kl", "finish_reason")
        return [dict(zip(names, values)) for values in zip(*columns, few.finish_reasons)]

    def save_model(self, directory: Path) -> None:
        """The policy and its tokenizer, as `save_pretrained` writes them. Call it in the main process."""
        self.actor_critic.policy.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def save_value_model(self, directory: Path) -> None:
        """The critic as a sequence-classification directory; a shared one with a copy of the policy's backbone."""
        critic = self.actor_critic.critic
        model = classifier_from(self.actor_critic.policy, critic) if isinstance(critic, ValueHead) else critic
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _rows_of_iteration(self) -> list[int]:
        """This process's share of the next `rollout_batch_size` rows of an endless shuffled pass over train_dataset."""
        share = self.args.rollout_batch_size // self.accelerator.num_processes
        first = self.iteration * self.args.rollout_batch_size + self.accelerator.process_index * share
        return shuffled(np.arange(first, first + share), len(self.train_prompts), self.seed).tolist()

    def _generator(self, purpose: str) -> torch.Generator:
        """A generator for one purpose in one iteration and process; evaluation draws the same in all iterations."""
        iteration = 0 if purpose == "evaluation" else self.iteration
        key = f"{self.seed}/{purpose}/{iteration}/{self.accelerator.process_index}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))

    def _rate(self, step: int) -> float:
        args = self.args
        max_steps = args.num_iterations * args.num_ppo_epochs * args.num_mini_batches
        kind = "wsd" if args.lr_scheduler_type == "constant" else args.lr_scheduler_type
        return schedule(kind, step, warmup_steps=args.warmup_steps, max_steps=max_steps, decay_fraction=0.0)

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), reduction="sum"))

    def _last_good(self) -> str:
        saved = sorted((self.output_dir / "checkpoints").glob("step-*"))
        return f"The last good checkpoint is {saved[-1]}." if saved else "No checkpoint was saved before."

    def _save(self) -> None:
        tensors = {
            "model": checkpoint.model_tensors(self.model),
            "optimizer": checkpoint.optimizer_tensors(self.model, [self.optimizer]),
            "random": checkpoint.random_tensors(),
        }
        if self.accelerator.is_main_process:
            folder = self.output_dir / "checkpoints"
            state = {name: getattr(self, name) for name in STATE}
            checkpoint.save(folder / f"step-{self.iteration:06d}", tensors=tensors, state=state)
            rotate(folder)
        self.accelerator.wait_for_everyone()

    def _load(self, source: bool | Path) -> None:
        path = Path(source) if source is not True else None
        if source is True and self.accelerator.is_main_process:
            path = latest_checkpoint(self.output_dir / "checkpoints")
        (path,) = broadcast_object_list([path])
        if path is None:
            return
        tensors, state = checkpoint.load(path)
        checkpoint.load_model(self.model, tensors["model"])
        checkpoint.load_optimizers(self.model, [self.optimizer], tensors["optimizer"])
        checkpoint.load_random(tensors["random"], self.accelerator.process_index)
        for name in STATE:
            setattr(self, name, state[name])
        self.say(f"ppo: going on from iteration {self.iteration} ({path})")
