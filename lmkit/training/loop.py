"""The training loop of pretraining and vision, on Accelerate: exact losses, exact resume, one checkpoint mechanism.

The loss of an update is the sum of its samples' losses over the number of counted tokens, both over all micro-batches
and all processes; so half the micro-batch, or two processes, give the same update.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from lmkit import processes
from lmkit.artifact import check_inputs
from lmkit.data.order import batch_positions, shuffled
from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.stage import Stage, latest_checkpoint, rotate
from lmkit.tracking import Tracker
from lmkit.training import checkpoint, sharding
from lmkit.training.ema import EMA
from lmkit.training.memory import keep_freed_pages
from lmkit.training.mfu import peak_flops
from lmkit.training.optimizers import build_optimizers, schedule
from lmkit.training.options import TrainConfig
from lmkit.training.prefetch import prefetch

# Width from which bfloat16 is faster on a CPU with avx512_bf16, with attention in float32 (models/attention): a step
# of the tiny preset on 32 x 112 tokens takes 361 instead of 471 ms on Zen 4. Below it conversions cost what they save.
CPU_BF16_WIDTH = 128


def make_accelerator(bf16: bool | None, width: int) -> Accelerator:
    """Accelerator of this process; `bf16` None: by device, on a CPU by its instructions and the model's width.

    BadInput when the launcher asked for several processes and they do not know of each other, or for what
    `lmkit.training.sharding` does not do.
    """
    sharding.asked_sharding(processes.join().num_processes)
    return sharding.plain_accelerator(mixed_precision(bf16, width))


def mixed_precision(bf16: bool | None, width: int) -> str:
    """What `Accelerator(mixed_precision=...)` takes; `bf16` None: bfloat16 where it is faster at this width."""
    on_cpu = not torch.cuda.is_available() or processes.is_set("ACCELERATE_USE_CPU")
    if bf16 is None and on_cpu:
        bf16 = width >= CPU_BF16_WIDTH and torch.cpu.get_capabilities().get("avx512_bf16", False)
    elif bf16 is None:
        bf16 = torch.cuda.is_bf16_supported()
    return "bf16" if bf16 else "no"


def fit(
    module: nn.Module,
    fetch: Callable[[np.ndarray], Mapping[str, Tensor]],
    num_samples: int | None,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    stage: Stage,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    sample: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
    ema: EMA | None = None,
    flops_per_token: float | None = None,
    enough: Callable[[], bool] = lambda: False,
    unit: str = "tokens",
) -> dict[str, float]:
    """Trains `module` in place for `config.max_steps` updates, from the stage's newest checkpoint if there is one.

    module: forward(**batch) -> (sum of losses, number of counted tokens), two scalars. Where it is sharded it has
        weights in `evaluate` and `sample`, and after `fit`.
    fetch: sample numbers [B] below num_samples -> the batch, tensors on the CPU; called in threads ahead of time, so it
        must not draw from global generators. num_samples None: it is given the positions themselves, counted from the
        start of training, and has an order of its own (`lmkit.data.mixture`).
    evaluate: called in every process between updates, with `module` in eval mode; its metrics are logged.
    sample: gives rows for samples.jsonl; called by the main process alone at each evaluation, and must leave the random
        state as it was.
    ema: follows the weights, is saved and resumed with them, and evaluated as eval/ema_*.
    flops_per_token: FLOP a counted token costs; with it rows have `mfu` on devices whose peak is known.

    Returns the last metrics. Raises Stopped on a non-finite loss or gradient: before the update on a CPU, on a
    GPU at the latest before the next log row, evaluation or checkpoint. Raises Interrupted after a signal, a
    checkpoint saved.
    """
    if config.gradient_checkpointing:
        _recompute_activations(module)
    if accelerator.device.type == "cpu":
        keep_freed_pages()
    compiled = accelerator.device.type == "cuda" if config.torch_compile is None else config.torch_compile
    prepared = sharding.prepare(module, accelerator, compiled)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizers = build_optimizers(prepared, config.optim, config.learning_rate, config.weight_decay, betas)
    torch.manual_seed(stage.config.seed + accelerator.process_index)
    # Sums over the steps since the last row: loss, counted tokens, gradient norm. One wait for the device reads them.
    window = torch.zeros(3, device=accelerator.device)
    accumulation = config.accumulation(accelerator.num_processes)
    batch_size = config.per_device_train_batch_size * accumulation * accelerator.num_processes
    resumed = _resume(prepared, optimizers, window, ema, batch_size, accelerator, stage)
    start, metrics = resumed["step"], resumed["metrics"]
    last = start if resumed["ended"] else config.max_steps
    peak = peak_flops(accelerator.device)
    batches = _batches(fetch, num_samples, start, accumulation, config, accelerator, stage.config.seed)
    counted_before = window[1].item()  # by the run that was stopped: no part of this one's speed
    cadences = {"log": config.logging_steps, "evaluate": config.eval_steps, "save": config.save_steps}
    options = {"total_steps": config.max_steps, "start_step": start, "accelerator": accelerator}
    options |= {"report_to": stage.config.report_to, "description": stage.name, "unit": unit}
    with contextlib.closing(batches), Tracker(stage.directory, **options) as tracker:
        for step in range(start + 1, last + 1):
            due = {name for name, every in cadences.items() if step % every == 0 or step == config.max_steps}
            look = bool(due) or accelerator.device.type == "cpu"
            rate = config.learning_rate * _rate_factor(config, step - 1)
            prepared.train()
            samples, sums = _gradients(prepared, itertools.islice(batches, accumulation), accumulation, accelerator)
            norm = sharding.full(nn.utils.get_total_norm(p.grad for p in prepared.parameters() if p.grad is not None))
            window += torch.stack([*sums, norm.to(sums)])
            if look and not math.isfinite(window.sum()):
                raise Stopped(_what_is_not_finite(prepared, sums, step, samples, stage))
            nn.utils.clip_grads_with_norm_(prepared.parameters(), config.max_grad_norm, norm)
            _update(optimizers, rate)
            if ema is not None:
                ema.update(step)
            if "log" in due:
                loss_sum, tokens, norms = window.tolist()
                num_steps = (step - 1) % config.logging_steps + 1
                row = {"loss": loss_sum / tokens, "grad_norm": norms / num_steps, "learning_rate": rate}
                if peak and flops_per_token:
                    seconds = time.monotonic() - tracker.last_log
                    all_peaks = peak * accelerator.num_processes
                    row["mfu"] = (tokens - counted_before) * flops_per_token / seconds / all_peaks
                tracker.log(step, row, tokens=round(tokens - counted_before))
                counted_before = 0.0
                metrics |= row
                window.zero_()
            if "evaluate" in due and evaluate is not None:
                scores, rows = _evaluate(module, prepared, evaluate, sample, ema, accelerator)
                if rows:
                    tracker.sample(step, rows)
                tracker.log(step, scores)
                metrics |= scores
            stop = look and processes.any_process(stage.stop_requested(), accelerator)
            ended = "evaluate" in due and processes.any_process(enough(), accelerator)
            if stop or ended or "save" in due:
                state = {"step": step, "window": window.tolist(), "batch_size": batch_size}
                state |= {"metrics": metrics, "ended": ended}
                _save(prepared, optimizers, ema, state, accelerator, stage)
            if ended:
                break
            if stop and step < config.max_steps:
                raise Interrupted(
                    f"{stage.name} stopped after step {step} of {config.max_steps}; a checkpoint is saved."
                )
    if ema is not None:
        ema.fill(module, prepared)
    sharding.fill(module, prepared)
    return metrics


def _rate_factor(config: TrainConfig, updates: int) -> float:
    steps = {"warmup_steps": config.warmup_steps, "max_steps": config.max_steps}
    return schedule(config.lr_scheduler_type, updates, **steps, decay_fraction=config.decay_fraction)


def _recompute_activations(module: nn.Module) -> None:
    """Blocks keep their input alone and compute the rest again in the backward; BadInput for a model that cannot."""
    for inner in module.modules():
        if getattr(inner, "supports_gradient_checkpointing", False):
            inner.gradient_checkpointing_enable({"use_reentrant": False})
            return
    raise BadInput("train.gradient_checkpointing: this model has no blocks that can be recomputed. Leave it out.")


Batch = tuple[np.ndarray, Mapping[str, Tensor]]  # sample numbers, tensors


def _batches(fetch, num_samples, start, accumulation, config, accelerator, seed) -> Iterator[Batch]:
    """This process's micro-batches from update `start` on, in order, made ready ahead of time."""
    split = {"size": config.per_device_train_batch_size, "accumulation": accumulation}
    split["world"] = accelerator.num_processes

    def load(place: tuple[int, int]) -> Batch:
        numbers = batch_positions(*place, accelerator.process_index, **split)
        if num_samples is not None:
            numbers = shuffled(numbers, num_samples, seed)
        batch = fetch(numbers)
        if accelerator.device.type == "cuda":  # only from pinned memory does a copy run beside the computation
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return numbers, batch

    places = ((update, part) for update in range(start, config.max_steps) for part in range(accumulation))
    return prefetch(load, places, config.dataloader_num_workers)


def _gradients(prepared, batches: Iterable[Batch], accumulation: int, accelerator) -> tuple[list[int], Tensor]:
    """Puts the gradient of the mean loss into the parameters; this process's samples, [loss sum, tokens] over all."""
    sums, samples = torch.zeros(2, device=accelerator.device), []
    for micro_batch, (numbers, batch) in enumerate(batches):
        samples += numbers.tolist()
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        is_last = micro_batch == accumulation - 1
        # Gradients are exchanged between processes once, after the last micro-batch.
        with contextlib.nullcontext() if is_last else accelerator.no_sync(prepared):
            loss, count = prepared(**batch)
            accelerator.backward(loss)
        sums += torch.stack([loss.detach(), count]).to(sums)
    sums = accelerator.reduce(sums, reduction="sum")
    gradients = [p.grad for p in prepared.parameters() if p.grad is not None]
    # The processes' gradients were averaged; the loss is a mean over the tokens of all of them.
    torch._foreach_mul_(gradients, accelerator.num_processes / sums[1])
    return samples, sums


def _update(optimizers: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def _evaluate(module, prepared, evaluate, sample, ema, accelerator) -> tuple[dict[str, float], Sequence]:
    """(metrics of the weights and, as eval/ema_*, of their average; the main process's sample rows)."""
    checkpoint.check_finite(dict(prepared.named_parameters()))
    module.eval()
    with sharding.whole(module, prepared):
        scores = dict(evaluate())
        rows = sample() if sample is not None and accelerator.is_main_process else []
    if ema is not None:
        with ema.applied(), sharding.whole(module, prepared):
            scores |= {name.replace("eval/", "eval/ema_"): score for name, score in evaluate().items()}
    return scores, rows


def _what_is_not_finite(prepared: nn.Module, sums: Tensor, step: int, samples: list[int], stage: Stage) -> str:
    gradients = [(n, p.grad) for n, p in prepared.named_parameters() if p.grad is not None]
    broken = [name for name, gradient in gradients if not gradient.isfinite().all()]
    mean = sums[0].item() / sums[1].item() if sums[1] else math.nan
    return (
        f"step {step}: the loss is {mean} over {sums[1]:.0f} tokens, {len(broken)} of {len(gradients)} gradients are "
        f"not finite ({', '.join(broken[:3])}). Samples of this process: {samples[:16]}. The last checkpoint in "
        f"{stage.checkpoints} is from before this step. Lower train.learning_rate, or look at these samples."
    )


def _save(prepared, optimizers, ema, state, accelerator, stage) -> None:
    check_inputs()
    tensors = {
        "model": checkpoint.model_tensors(prepared),
        "optimizer": checkpoint.optimizer_tensors(prepared, optimizers),
        "random": checkpoint.random_tensors(),
    }
    if ema is not None:
        with ema.applied():
            tensors["ema"] = {name: tensor.clone() for name, tensor in checkpoint.model_tensors(prepared).items()}
    if accelerator.is_main_process:
        checkpoint.save(stage.checkpoints / f"step-{state['step']:06d}", tensors=tensors, state=state)
        rotate(stage.checkpoints)
    accelerator.wait_for_everyone()


def _resume(prepared, optimizers, window, ema, batch_size, accelerator, stage) -> dict[str, Any]:
    """Sets everything as the newest checkpoint has it; the state that was saved with it, of step 0 without one.

    BadInput when an update then had another number of samples, as with other processes: the order would be another.
    """
    accelerator.wait_for_everyone()
    path = latest_checkpoint(stage.checkpoints) if accelerator.is_main_process else None
    (path,) = broadcast_object_list([path])
    if path is None:
        if ema is not None:
            ema.start(prepared)
        return {"step": 0, "metrics": {}, "ended": False}
    tensors, state = checkpoint.load(path)
    if state["batch_size"] != batch_size:
        raise BadInput(
            f"{path} was made with {state['batch_size']} samples an update; per_device_train_batch_size, accumulation "
            f"and {accelerator.num_processes} process(es) now make {batch_size}. Start as many processes as before; "
            "with train.global_batch_size a run can go on with any number."
        )
    if ema is not None:
        checkpoint.load_model(prepared, tensors["ema"])
        ema.start(prepared)
    checkpoint.load_model(prepared, tensors["model"])
    checkpoint.load_optimizers(prepared, optimizers, tensors["optimizer"])
    checkpoint.load_random(tensors["random"], accelerator.process_index)
    window.copy_(torch.tensor(state["window"]))
    stage.say(f"{stage.name}: going on from step {state['step']} ({path})")
    return state
