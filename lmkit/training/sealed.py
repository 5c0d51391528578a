"""TRL's trainers inside a stage: sealed checkpoints, exact resume, stopping on a signal or a non-finite gradient.

    class SealedSFTTrainer(SealedCheckpoints, SFTTrainer): ...
    trainer = SealedSFTTrainer(stage, model=model, args=arguments(SFTConfig, train, stage), ...)
    train(trainer)

What the Hugging Face trainer writes for a checkpoint goes to a staging folder and becomes visible by `seal`, so a kill
at any moment leaves the checkpoint before it; resuming takes the newest one that verifies.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import set_seed

from lmkit import processes
from lmkit.artifact import seal
from lmkit.errors import BadInput, CorruptInput, Interrupted, Stopped
from lmkit.stage import Stage, latest_checkpoint, rotate
from lmkit.tracking import Tracker
from lmkit.training.checkpoint import check_finite, num_bytes
from lmkit.training.loop import mixed_precision
from lmkit.training.optimizers import Joined, build_optimizers

Sampler = Callable[[], Sequence[Mapping[str, Any]]]
SHOWN_FIRST = ("loss", "accuracy", "mean_token_accuracy")
# What the Hugging Face trainer logs about its own speed; the tracker has the clock.
UNTRACKED = ("_runtime", "_per_second", "num_tokens", "total_flos", "train_loss", "epoch")


def arguments(
    cls: type, train: dict[str, Any], stage: Stage, max_length: int | None = None, width: int | None = None
) -> Any:
    """The `SFTConfig` or `RewardConfig` of a stage: what fits the device, then `train`, then what the stage decides.

    Without a GPU training is in float32 on the CPU; with one that can, in bfloat16. Raises BadInput when the class
    refuses the values, or the launcher asked for shards that these trainers do not share with lmkit. max_length: of a
    row into which several are packed; rows that are not packed fit already. width: of a model that trains in bfloat16
    on a CPU as well, where pretraining would.
    """
    _check_launcher(cls)
    processes.join()  # transformers would wait for a hung process for half an hour on a CPU
    gpu = torch.cuda.is_available()
    device = {
        "bf16": (gpu or width is not None) and mixed_precision(None, width or 0) == "bf16" and not train.get("fp16"),
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
    }
    decided = {
        "output_dir": str(stage.directory),
        "seed": stage.config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "max_length": max_length,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL's own default uses a name that transformers deprecates
            return cls(**(device | train | decided))
    except (ValueError, TypeError) as error:
        raise BadInput(f"train: {cls.__name__} refuses these values: {error}") from None


def _check_launcher(cls: type) -> None:
    if processes.is_set("ACCELERATE_USE_FSDP"):
        raise BadInput(
            "the launcher asked for FSDP, which serves pretrain, ppo and vision alone: this stage samples from the "
            "whole model and saves it, and on a CPU Accelerate would turn FSDP silently into DDP. Launch it with "
            "accelerate_configs/ddp.yaml or zero2.yaml."
        )
    if _is_zero3() and cls.__name__ == "RewardConfig":
        raise BadInput("a reward model is centred and judged whole, which ZeRO-3 has nowhere: launch with zero2.yaml.")


def _is_zero3() -> bool:
    return processes.is_set("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


class SealedCheckpoints:
    """Mixed in before a TRL trainer; the first argument is the stage that the checkpoints and metrics belong to.

    muon: hidden matrices and heads learn by Muon and the rest by AdamW, as in pretraining, not by `train.optim`.
        DeepSpeed flattens what it trains, so there it is left to `train.optim`.
    """

    def __init__(self, stage: Stage, *, muon: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.stage, self.muon = stage, muon
        self._staging = None
        self.remove_callback(PrinterCallback)

    def _get_output_dir(self, trial):
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        main, target = self.accelerator.is_main_process, self.stage.checkpoints / f"step-{self.state.global_step:06d}"
        staging = target.with_name(f".staging-{target.name}")
        parameters = dict(model.named_parameters())
        check_finite(parameters)
        # Two moments for each parameter that learns, and the parameters.
        wanted = num_bytes(parameters.values()) + 2 * num_bytes(p for p in parameters.values() if p.requires_grad)
        with seal(target, wanted) if main else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            self.accelerator.wait_for_everyone()
            if main:
                self._flatten(staging)
        self.accelerator.wait_for_everyone()
        if main:
            rotate(self.stage.checkpoints)

    def _flatten(self, staging):
        """Moves `checkpoint-120/*` up; the pickled arguments are dropped, since nothing reads them."""
        written = staging / f"checkpoint-{self.state.global_step}"
        (written / "training_args.bin").unlink(missing_ok=True)
        for path in written.iterdir():
            path.rename(staging / path.name)
        written.rmdir()

    def _get_grad_norm(self, model, grad_norm=None):
        # Called on every rank between backward and the optimizer's step; a NaN loss anywhere makes it NaN everywhere.
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            step, saved = self.state.global_step + 1, self.stage.checkpoints
            raise Stopped(
                f"the gradient of step {step} is not finite, so nothing was updated. Lower --train.learning_rate or "
                f"look at the data; the last checkpoint is in {saved}."
            )
        return norm

    def create_optimizer(self, model=None):
        if self.muon and self.optimizer is None and not self.is_deepspeed_enabled:
            args = self.args
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = Joined(build_optimizers(self.model, "muon", args.learning_rate, args.weight_decay, betas))
        return super().create_optimizer(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Sampling from weights that are not finite would end in a traceback.
        check_finite(dict(self.model.named_parameters()))
        return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No README.md beside the record: the run's report says what TRL's card would, with numbers."""


class SealedSFT(SealedCheckpoints):
    """That before SFTTrainer; held-out loss, accuracy and entropy are means over tokens, whatever the batches."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**self._prepare_inputs(inputs), use_cache=False, fused_lm_head=True)
        tables = (-out.log_probs, out.is_top1, out.entropy, out.label_mask)  # 0 where nothing is asked for
        rows = torch.stack([table.double().sum(1) for table in tables], 1)
        self._held_out += self.accelerator.gather_for_metrics(rows).sum(0)
        return rows[:, 0].sum() / rows[:, -1].sum(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._held_out = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        output = super().evaluation_loop(*args, **kwargs)
        # The trainer's own are means of batches' means, in which tokens of short answers weigh more.
        means = (self._held_out[:3] / self._held_out[3]).tolist()
        output.metrics.update(zip(("eval_loss", "eval_mean_token_accuracy", "eval_entropy"), means))
        return output


class _Progress(TrainerCallback):
    """Passes what the trainer logs to the tracker, samples when it evaluates, and a signal to the trainer."""

    def __init__(self, trainer: SealedCheckpoints, cleanup: contextlib.ExitStack, sample: Sampler | None):
        self.trainer, self.cleanup, self.sample, self.num_tokens = trainer, cleanup, sample, 0

    def on_train_begin(self, args, state, control, **kwargs):
        stage = self.trainer.stage
        tracker = Tracker(
            stage.directory,
            total_steps=state.max_steps,
            start_step=state.global_step,
            accelerator=self.trainer.accelerator,
            report_to=stage.config.report_to,
            description=stage.name,
        )
        self.tracker = self.cleanup.enter_context(tracker)

    def on_log(self, args, state, control, logs, **kwargs):
        names = sorted(logs, key=lambda name: name.removeprefix("eval_") not in SHOWN_FIRST)
        metrics = {name: logs[name] for name in names if not name.endswith(UNTRACKED)}
        if metrics:
            tokens = self.trainer._total_train_tokens - self.num_tokens
            self.num_tokens += tokens
            self.tracker.log(state.global_step, metrics, tokens=tokens if "loss" in metrics else None)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.sample is not None and self.trainer.accelerator.is_main_process and not _is_zero3():
            rows = self.sample()
            self.tracker.sample(state.global_step, rows)
            self.trainer.stage.say(f"sample: {rows[0]['prompt']} -> {rows[0]['completion']}")

    def on_step_end(self, args, state, control, **kwargs):
        if processes.any_process(self.trainer.stage.stop_requested(), self.trainer.accelerator):
            control.should_save = control.should_training_stop = True


def train(trainer: SealedCheckpoints, sample: Sampler | None = None) -> None:
    """Trains to the last step, from the newest checkpoint that verifies if there is one.

    sample: gives rows of prompt and completion for samples.jsonl; the main process calls it at each evaluation, and it
        must leave the random state as it was.

    Raises Interrupted after saving when a signal asked to stop, Stopped when a gradient is not finite.
    """
    main = trainer.accelerator.is_main_process
    (checkpoint,) = broadcast_object_list([latest_checkpoint(trainer.stage.checkpoints) if main else None])
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer.stage.say(f"resuming from step {state.global_step} of {state.max_steps}")
        if state.global_step == state.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))  # train() would take one step more
            trainer.state = state
            return
    set_seed(trainer.args.seed)
    with contextlib.ExitStack() as cleanup:
        trainer.add_callback(_Progress(trainer, cleanup, sample))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:
            if "Weights only load failed" not in str(error):
                raise
            raise CorruptInput(f"{checkpoint} holds a pickle that would run code: delete it. ({error})") from None
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, saved.")


def final_evaluation(trainer: SealedCheckpoints) -> dict[str, float]:
    """The held-out metrics of the trained model (`eval_loss`, ...): those of the last step, or measured now."""
    logged = [row for row in trainer.state.log_history if row["step"] == trainer.state.global_step]
    return next((row for row in logged if "eval_loss" in row), None) or trainer.evaluate()


def save_model(trainer: SealedCheckpoints, model: PreTrainedModel | None = None) -> None:
    """Seals the trained model, or `model` in its stead, with its tokenizer as an artifact; every process calls it."""
    stage, main = trainer.stage, trainer.accelerator.is_main_process
    parameters = dict((model or trainer.model).named_parameters())
    check_finite(parameters)
    folder = stage.directory / ".staging-model"
    with stage.seal("model", num_bytes(parameters.values())) if main else contextlib.nullcontext():
        trainer.accelerator.wait_for_everyone()
        if model is None or model is trainer.model:
            trainer.save_model(str(folder))  # gathers the weights where they are sharded
        elif main:
            model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
        (folder / "training_args.bin").unlink(missing_ok=True)
