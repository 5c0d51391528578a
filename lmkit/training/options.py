"""Settings of the training loop, under Hugging Face's names. No torch, so that a wrong flag is answered at once."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lmkit.config import Config, knob, setting
from lmkit.errors import BadInput


class TrainConfig(Config):
    """An update sees per_device_train_batch_size x gradient_accumulation_steps x processes samples, or
    global_batch_size of them."""

    max_steps: int = setting(1000, "optimizer updates", gt=0)
    per_device_train_batch_size: int = setting(32, "samples a process takes through the model at once", gt=0)
    gradient_accumulation_steps: int = setting(1, "micro-batches whose gradients make one update", gt=0)
    global_batch_size: int | None = setting(
        None, "samples an update over all processes; accumulation follows, and any number of processes goes on", gt=0
    )
    learning_rate: float = setting(1e-2, "peak learning rate, of Muon and AdamW alike", gt=0)
    lr_scheduler_type: Literal["wsd", "cosine", "linear"] = setting("wsd", "learning rate after the warmup")
    warmup_steps: int = setting(20, "updates until the learning rate has its peak", ge=0)
    decay_fraction: float = setting(0.5, "share of all steps in which wsd falls to zero", ge=0, le=1)
    weight_decay: float = setting(0.1, "decay of the matrices (not of embeddings, gains and biases)", ge=0)
    adam_beta1: float = setting(0.9, "AdamW's memory of gradients", ge=0, lt=1)
    adam_beta2: float = setting(0.95, "AdamW's memory of their squares", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", gt=0)
    optim: Literal["muon", "adamw_torch_fused"] = setting("muon", "muon: for hidden matrices, and AdamW for the rest")
    ema_decay: float | None = setting(None, "decay of averaged weights; empty: none are kept", gt=0, lt=1)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward: less memory, more time")
    bf16: bool | None = setting(None, "matrix products in bfloat16; empty: where it is faster")
    torch_compile: bool | None = setting(None, "compile the model, block by block; empty: on GPUs")
    dataloader_num_workers: int = knob(1, "threads that make batches ready ahead; the data is the same", ge=0)
    logging_steps: int = knob(20, "updates between two rows of metrics.jsonl", gt=0)
    eval_steps: int = knob(100, "updates between two evaluations; there is always one at the end", gt=0)
    save_steps: int = knob(200, "updates between two checkpoints", gt=0)

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}")
        return self

    @model_validator(mode="after")
    def _one_way_to_accumulate(self) -> TrainConfig:
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps follows from global_batch_size: give one of the two")
        return self

    def accumulation(self, num_processes: int) -> int:
        """Micro-batches a process takes for one update; BadInput when global_batch_size does not divide into them."""
        at_once = self.per_device_train_batch_size * num_processes
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        if self.global_batch_size % at_once:
            raise BadInput(
                f"train.global_batch_size {self.global_batch_size} is no multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {num_processes} process(es). Change one of them."
            )
        return self.global_batch_size // at_once
