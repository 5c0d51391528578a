"""Settings of the training loop, under Hugging Face's names. No torch, so that a wrong flag is answered at once."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lmkit.config import Config, knob, setting


class TrainConfig(Config):
    """A batch has per_device_train_batch_size x gradient_accumulation_steps x processes samples."""

    max_steps: int = setting(800, "optimizer updates", gt=0)
    per_device_train_batch_size: int = setting(32, "samples a process takes through the model at once", gt=0)
    gradient_accumulation_steps: int = setting(1, "micro-batches whose gradients make one update", gt=0)
    learning_rate: float = setting(1e-2, "peak learning rate, of Muon and AdamW alike", gt=0)
    lr_scheduler_type: Literal["wsd", "cosine", "linear"] = setting("wsd", "learning rate after the warmup")
    warmup_steps: int = setting(20, "updates until the learning rate has its peak", ge=0)
    decay_fraction: float = setting(0.5, "share of all steps in which wsd falls to zero", ge=0, le=1)
    weight_decay: float = setting(0.1, "decay of the matrices (not of embeddings, gains and biases)", ge=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", gt=0)
    optim: Literal["muon", "adamw_torch_fused"] = setting("muon", "muon: for hidden matrices, and AdamW for the rest")
    bf16: bool | None = setting(None, "matrix products in bfloat16; empty: where it is faster")
    torch_compile: bool | None = setting(None, "compile the model; empty: on GPUs")
    logging_steps: int = knob(20, "updates between two rows of metrics.jsonl", gt=0)
    eval_steps: int = knob(100, "updates between two evaluations; there is always one at the end", gt=0)
    save_steps: int = knob(200, "updates between two checkpoints", gt=0)

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}")
        return self
