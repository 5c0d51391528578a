"""PPO on the plain Hugging Face stack: rollout -> score -> advantages -> epochs x mini-batches x micro-batches.

    trainer = PPOTrainer(model, reward="runs/tiny/reward/model", args=PPOConfig(...), train_dataset=rows,
                         processing_class=tokenizer, output_dir="runs/mine/ppo")
    trainer.train()
    trainer.save_model()

Everything random is derived from the seed, the iteration and the purpose (prompts, sampling, shuffling), so a
checkpoint needs no generator's state, and a resumed run takes the same bits as one never stopped (CPU).
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.generation.complete import completion_texts
from lmkit.models.attention import faster_attention
from lmkit.models.load import load_language_model
from lmkit.processes import any_process
from lmkit.rl import state
from lmkit.rl.config import PPOConfig
from lmkit.rl.drawing import Drawing
from lmkit.rl.kl import adapted_kl_coef
from lmkit.rl.lora import acting
from lmkit.rl.metrics import (
    evaluation_metrics,
    explained_variance,
    guard,
    reward_metrics,
    rollout_metrics,
    sample_table,
    warnings,
)
from lmkit.rl.plan import Plan
from lmkit.rl.prompts import Prompts, encode_prompts
from lmkit.rl.ptx import Text, mixed_in
from lmkit.rl.rewards import RunningNorm
from lmkit.rl.roles import make_roles
from lmkit.rl.rollout import Rollout, collect, completion_ids, values_after
from lmkit.rl.scorers import Batch
from lmkit.rl.shares import gathered
from lmkit.rl.update import advantages_and_returns, counted_tokens, make_optimizer, paid_metrics, update
from lmkit.stage import latest_checkpoint, newest_first, rotate
from lmkit.tokenization.chat import stop_token_ids
from lmkit.tracking import Tracker
from lmkit.training import checkpoint, sharding
from lmkit.training.loop import make_accelerator

# What a checkpoint holds besides tensors.
STATE = ("iteration", "kl_coef", "metrics", "samples", "ref_scores")


class PPOTrainer:
    """Trains `model` in place against a reward, held near a reference by a KL penalty.

    model: a causal language model, or its directory; its dropout is set to 0.
    reward: a reward model, its directory, "module:function", a function (prompts, completions, **columns) -> numbers,
        an http(s) address, or a list of them: see `make_reward`.
    args: options of the algorithm.
    train_dataset, eval_dataset: rows with `prompt`, a text or a conversation; other columns reach the reward function.
    processing_class: the tokenizer; that of the model's directory when not given.
    ref_model: what the KL is measured from; a frozen copy of `model` when not given.
    value_model: the critic where args.critic is "separate"; a copy of the reward model when not given.
    peft_config: a peft.LoraConfig. `model` is frozen then and serves the policy, the reference and the critic (and the
        reward, where that is a directory with a LoRA adapter of the same model), with adapters of their own or none.
    ptx_dataset: text for args.ptx_coef: rows as `encode_demonstrations` makes them, or what `rl.ptx.load_text` gives.
    output_dir: metrics.jsonl, samples.jsonl, checkpoints/ and what is saved without a name are written there.
    evaluation: (rows, completions as texts) -> metrics, added to those of `evaluate`; rows are dicts of eval_dataset.
    seed: of every random choice. report_to: Accelerate's trackers, beside metrics.jsonl.
    stop_requested: asked after each iteration; once True a checkpoint is saved and Interrupted raised.
    say: takes lines meant for the user.

    Raises BadInput for what cannot work, before anything is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        reward: Any,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        value_model: PreTrainedModel | None = None,
        peft_config: LoraConfig | None = None,
        *,
        ptx_dataset: Dataset | Text | None = None,
        output_dir: str | Path = "trainer_output",
        evaluation: Callable[[list[dict], list[str]], Mapping[str, float]] | None = None,
        seed: int = 0,
        report_to: Sequence[str] = (),
        stop_requested: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ):
        if isinstance(model, str | Path):
            model, found = load_language_model(Path(model))
            processing_class = processing_class or found
        if processing_class is None or train_dataset is None:
            missing = "train_dataset" if processing_class is not None else "processing_class"
            raise BadInput(f"PPOTrainer needs a {missing}; pass {missing}=... .")
        self.args = args = args or PPOConfig()
        self.tokenizer, self.output_dir = processing_class, Path(output_dir)
        self.evaluation, self.report_to = evaluation, report_to
        # On a CPU the thin matrices of adapters take ten times as long in bfloat16 as whole ones.
        thin = peft_config is not None and args.bf16 is None and not torch.cuda.is_available()
        self.accelerator = make_accelerator(False if thin else args.bf16, model.config.get_text_config().hidden_size)
        self.plan = Plan(args, seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.stop_requested, self.say = stop_requested, say if self.accelerator.is_main_process else lambda text: None
        self.plan.check()
        models = {"ref_model": ref_model, "value_model": value_model, "peft_config": peft_config}
        self.roles = make_roles(model, reward, args, processing_class, **models, device=self.accelerator.device)
        self.actor_critic = self.roles.actor_critic
        self.model = sharding.prepare(self.actor_critic, self.accelerator)
        self.optimizer = make_optimizer(getattr(self.model, "module", self.model), args)
        self.stop_token_ids = stop_token_ids(processing_class)
        with self._whole() if args.use_vllm else contextlib.nullcontext():
            given = (processing_class, self.stop_token_ids, args, self.plan, self.accelerator, self.say)
            self.drawing = Drawing(model, *given)
        positions = getattr(model.config, "max_position_embeddings", None)
        given = (processing_class, positions, args, self.say)
        self.train_prompts = encode_prompts(train_dataset, "train_dataset", *given)
        self.eval_prompts = encode_prompts(eval_dataset, "eval_dataset", *given) if eval_dataset else None
        self.ptx = mixed_in(ptx_dataset, args.ptx_coef)
        self.iteration, self.kl_coef = 0, args.kl_coef
        self.score_norm = RunningNorm(args.use_score_norm, args.score_clip)
        self.metrics: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []
        self.ref_scores: list[float] = []  # of the reference at the start, on the evaluation prompts

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, float]:
        """Runs all iterations that are left; the last row of metrics.

        resume_from_checkpoint: True for the newest checkpoint of output_dir that verifies, if there is one; or a path.
        Raises Stopped when a guard or a non-finite number ends the run, and Interrupted after `stop_requested`.
        """
        args = self.args
        if resume_from_checkpoint:
            self._load(resume_from_checkpoint)
        options = {"total_steps": args.num_iterations, "start_step": self.iteration, "accelerator": self.accelerator}
        tracker = Tracker(self.output_dir, **options, report_to=self.report_to, description="ppo")
        # Those that learn are others than the roles' where the weights are shared out.
        learning = [module for module in self.model.modules() if isinstance(module, PreTrainedModel)]
        with tracker, faster_attention(self.accelerator, *self.roles.models(), *learning):
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
                stop = any_process(self.stop_requested(), self.accelerator)
                if stop or last or self.iteration % args.save_steps == 0:
                    self._save()
                if stop and not last:
                    raise Interrupted(f"stopped after iteration {self.iteration} of {args.num_iterations}, saved.")
        sharding.fill(self.actor_critic, self.model)
        return self.metrics

    def _iterate(self) -> tuple[dict[str, float], int]:
        """One iteration: rollout, advantages, updates. Returns its metrics and the number of tokens drawn."""
        args, accelerator, started = self.args, self.accelerator, time.perf_counter()
        index = self.plan.rows(self.iteration, len(self.train_prompts.ids))
        try:
            with self._whole():
                rollout, seconds = self.collect(self.train_prompts, index, "sampling", args.one_step_off_policy)
        except BadInput as error:  # of reward or server; other processes may not have met it, so no collective here
            if self.iteration and accelerator.num_processes == 1:
                self._save()
            raise BadInput(f"iteration {self.iteration + 1}: {error} {self._last_good()}") from error
        metrics = rollout_metrics(rollout, args, self.kl_coef)
        metrics |= reward_metrics(self.roles.reward.parts, accelerator)
        self.samples = sample_table(rollout, self.train_prompts.rows, index, self.decode)
        if broken := guard(metrics, args):
            raise Stopped(f"iteration {self.iteration + 1}: {broken}. {self._last_good()}")
        rollout = replace(rollout, scores=self.score_norm(rollout.scores))
        metrics |= paid_metrics(rollout, args, self.kl_coef)
        advantages, returns = advantages_and_returns(rollout, args, self.kl_coef)
        before_updates = time.perf_counter()
        try:
            learnt = update(
                rollout,
                advantages,
                returns,
                model=self.model,
                optimizer=self.optimizer,
                config=args,
                kl_coef=self.kl_coef,
                rates=self.plan.rates(self.iteration),
                accelerator=accelerator,
                generator=self.plan.generator("shuffle", self.iteration),
                ptx=None if self.ptx is None else self._text,
            )
            # The next thing these weights do is sample.
            checkpoint.check_finite(dict(self.model.named_parameters()))
        except Stopped as error:
            raise Stopped(f"iteration {self.iteration + 1}: {error} {self._last_good()}") from None
        seconds["train"] = time.perf_counter() - before_updates
        if args.adaptive_kl_target is not None:
            rule = {"num_episodes": args.rollout_batch_size, "horizon": args.adaptive_kl_horizon}
            kl = metrics["objective/kl"]
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=args.adaptive_kl_target, **rule)
        if args.ref_model_mixup_alpha:
            with sharding.whole(self.actor_critic, self.model):
                self.roles.move_reference(args.ref_model_mixup_alpha)
        self.iteration += 1
        waited = time.perf_counter()
        try:
            self.drawing.land()
        except BadInput as error:  # of the server
            raise BadInput(f"iteration {self.iteration + 1}: {error} {self._last_good()}") from error
        seconds["rollout"] += time.perf_counter() - waited
        metrics |= learnt
        if args.advantage_estimator == "gae":
            metrics |= explained_variance(rollout, returns, counted_tokens(rollout, args))
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        num_tokens = round(metrics["rollout/completion_length_mean"] * args.rollout_batch_size)
        metrics["perf/episodes_per_second"] = args.rollout_batch_size / (time.perf_counter() - started)
        metrics["episode"] = self.iteration * args.rollout_batch_size
        return metrics, num_tokens

    def _text(self, step: int) -> Mapping[str, Tensor]:
        return self.ptx.fetch(self.plan.text(self.iteration, step, len(self.ptx)))

    def collect(
        self, prompts: Prompts, index: Sequence[int], purpose: str, one_ahead: bool = False
    ) -> tuple[Rollout, dict[str, float]]:
        """A scored rollout of the rows in `index`, and the seconds its parts took here; `purpose` seeds the sampling.

        Each process collects its part of the rows, and all of them get the whole rollout. one_ahead: it is that of an
        iteration, drawn in the one before, and the next one's is begun.
        """
        args, device = self.args, self.accelerator.device
        own = self.plan.part(len(index))
        # A process without rows collects the first one as well, which is left out below.
        mine = index[own.start : own.stop] or index[:1]

        def draw(chosen):
            if one_ahead:
                return self.drawing.one_ahead(prompts.ids, self.iteration)
            return self.drawing(chosen, purpose, self.iteration, own.start)

        def forward(*inputs):
            # Not the prepared model: the processes may make different numbers of forwards.
            with self.accelerator.autocast():
                return self.actor_critic(*(tensor.to(device) for tensor in inputs), args.temperature, True)

        def ref_forward(*inputs):
            inputs = (tensor.to(device) for tensor in inputs)
            with self.accelerator.autocast():
                return (self.roles.ref_logprobs(*inputs, temperature=args.temperature),)

        self.actor_critic.eval()
        rollout, seconds = collect(
            [prompts.ids[row] for row in mine],
            draw,
            forward,
            ref_forward,
            lambda completions: self.score(prompts, mine, completions),
            args.per_device_train_batch_size,
        )
        if args.truncation == "bootstrap":
            rollout = replace(rollout, final_values=values_after(rollout, forward, args.per_device_train_batch_size))
        return gathered(rollout, self.accelerator).rows(torch.arange(len(index))), seconds

    def score(self, prompts: Prompts, index: Sequence[int], completions: list[list[int]]) -> Callable[[], Tensor]:
        """Starts to score a completion (ids) for each of the rows in `index`; what is returned gives the scores [B]."""
        columns = prompts.rows[list(index)]
        asked, texts = columns.pop("prompt"), self.decode(completions)
        spoken = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(asked, texts)
        ]
        ids = [prompts.ids[row] + completion for row, completion in zip(index, completions)]
        finish = self.roles.reward.start(Batch(asked, spoken, ids, columns))
        # Reward models too compute in the run's precision; functions work in threads of their own, outside of it.
        return self.accelerator.autocast()(finish)

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Completions as texts, without the stop token or what follows from a stop string on."""
        return completion_texts(self.tokenizer, completion_ids, self.stop_token_ids, self.args.stop_strings)

    def evaluate(self) -> dict[str, float]:
        """Score, KL, length and ending of one completion for each row of eval_dataset, and what `evaluation` adds.

        Every evaluation draws with the same seed, so that two of them differ by the policy alone; the reference's
        completions, against which win_rate_vs_ref is counted, are drawn with it too.
        """
        if not self.eval_prompts:
            raise BadInput("there is no eval_dataset to evaluate on; pass one to PPOTrainer.")
        prompts = self.eval_prompts
        index = range(len(prompts.ids))
        with self._whole():
            if not self.ref_scores:
                self.ref_scores = self._reference_scores(prompts)
            rollout, _ = self.collect(prompts, index, "evaluation")
        self.samples = sample_table(rollout, prompts.rows, index, self.decode)
        found = rollout_metrics(rollout, self.args, self.kl_coef)
        metrics = evaluation_metrics(found, rollout.scores.tolist(), self.ref_scores)
        if self.evaluation is not None:
            texts = self.decode(completion_ids(rollout))
            metrics |= {f"eval/{name}": value for name, value in self.evaluation([*prompts.rows], texts).items()}
        return metrics

    def _reference_scores(self, prompts: Prompts) -> list[float]:
        """Scores of the reference's completions of all prompts; each process draws its part."""
        reference, policy = self.roles.reference, self.actor_critic.policy
        own = self.plan.part(len(prompts.ids))
        mine = own or range(1)  # without rows of its own it draws for nothing: all processes have to
        with acting(policy, None) if reference is None else contextlib.nullcontext():
            model = policy if reference is None else reference
            drawn = self.drawing([prompts.ids[row] for row in mine], "evaluation", self.iteration, own.start, model)
        scores = self.score(prompts, mine, [drawn.ids(row) for row in range(len(mine))])().tolist()[: len(own)]
        return gather_object(scores) if self.accelerator.num_processes > 1 else scores

    def _whole(self) -> contextlib.AbstractContextManager:
        """Inside, this process has all weights of policy and critic, in the precision that they learn in."""
        return sharding.whole(self.actor_critic, self.model, sharding.compute_dtype(self.accelerator))

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The policy and its tokenizer, as `save_pretrained` writes them; LoRA adapters are merged into a copy.

        output_dir: a folder; that of the trainer, with /model, when not given. Call it in the main process, after
        `train`.
        """
        self._write(self.roles.plain_policy(), Path(output_dir or self.output_dir / "model"))

    def save_value_model(self, output_dir: str | Path | None = None) -> None:
        """The critic as a sequence-classification directory; a shared one with a copy of the policy's backbone."""
        self._write(self.roles.plain_critic(), Path(output_dir or self.output_dir / "value"))

    def _write(self, model: PreTrainedModel, folder: Path) -> None:
        if sharding.is_empty(model):
            raise BadInput("the model is in shares among the processes; it is whole, and can be saved, after train().")
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _last_good(self) -> str:
        saved = newest_first(self.output_dir / "checkpoints")
        return f"The last good checkpoint is {saved[0]}." if saved else "No checkpoint was saved before."

    def _save(self) -> None:
        tensors = state.gather(self.model, self.optimizer, self._moving_reference(), self.drawing.ahead)
        if self.accelerator.is_main_process:
            folder = self.output_dir / "checkpoints"
            rest = {name: getattr(self, name) for name in STATE} | {"score_norm": self.score_norm.state()}
            rest["next_prompts"] = self._next_prompts()
            checkpoint.save(folder / f"step-{self.iteration:06d}", tensors=tensors, state=rest)
            rotate(folder)
        self.accelerator.wait_for_everyone()

    def _load(self, source: bool | str | Path) -> None:
        path = Path(source) if source is not True else None
        if source is True and self.accelerator.is_main_process:
            path = latest_checkpoint(self.output_dir / "checkpoints")
        (path,) = broadcast_object_list([path])
        if path is None:
            return
        rank = self.accelerator.process_index
        found, self.drawing.ahead = state.restore(path, self.model, self.optimizer, self._moving_reference(), rank)
        for name in STATE:
            setattr(self, name, found[name])
        self.score_norm.load(found["score_norm"])
        if self.drawing.ahead is not None and found["next_prompts"] != self._next_prompts():
            raise BadInput(
                f"{path} has completions of other prompts, drawn one step off-policy. Go on with the seed, the "
                "train_dataset and the rollout_batch_size of that run."
            )
        self.say(f"ppo: going on from iteration {self.iteration} ({path})")

    def _next_prompts(self) -> str:
        """A hash of the prompts of the next iteration."""
        rows = self.plan.rows(self.iteration, len(self.train_prompts.ids))
        return hashlib.sha256(repr([self.train_prompts.ids[row] for row in rows]).encode()).hexdigest()

    def _moving_reference(self) -> PreTrainedModel | None:
        return self.roles.reference if self.args.ref_model_mixup_alpha else None
