"""Settings of PPO, under TRL's names where the meaning is TRL's. No torch, so that a wrong flag is answered at once."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from lmkit.config import Config, knob, setting


class PPOConfig(Config):
    """One iteration is a rollout of `rollout_batch_size` completions, then num_ppo_epochs x num_mini_batches updates.

    Defaults are those of the summarisation study (Huang et al., arXiv:2403.17031) with gradient clipping and a faster
    critic.
    """

    total_episodes: int = setting(100_000, "completions to learn from, over all iterations", gt=0)
    rollout_batch_size: int = setting(512, "completions of an iteration, over all processes", gt=0)
    num_ppo_epochs: int = setting(4, "passes over each rollout", gt=0)
    num_mini_batches: int = setting(1, "optimizer updates in each pass", gt=0)
    per_device_train_batch_size: int = setting(16, "rows a process takes through the model at once", gt=0)
    learning_rate: float = setting(3e-6, "learning rate of the policy", gt=0)
    value_learning_rate: float | None = setting(None, "learning rate of the critic; empty: 3 x learning_rate", gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting("linear", "learning rate after the warmup")
    warmup_steps: int = setting(0, "updates until the learning rates have their peak", ge=0)
    weight_decay: float = setting(0.0, "decay of all parameters", ge=0)
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "decay of AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = setting(1e-5, "AdamW's epsilon", gt=0)
    max_grad_norm: float = setting(1.0, "gradients of policy and critic are each scaled down to this norm", gt=0)
    bf16: bool | None = setting(None, "matrix products in bfloat16, weights in float32; empty: where it is faster")

    max_new_tokens: int = setting(53, "longest completion in tokens, the stop token included", gt=0)
    temperature: float = setting(0.7, "of sampling, and of every log-probability", gt=0)
    missing_eos_penalty: float = setting(1.0, "taken from the score of a completion without a stop token", ge=0)

    kl_coef: float = setting(0.05, "price of a nat of KL from the reference", ge=0)
    kl_target: float | None = setting(
        None, "nats per completion that an adaptive kl_coef steers to; empty: fixed", gt=0
    )
    kl_horizon: int = setting(10_000, "episodes over which the adaptive kl_coef adjusts", gt=0)

    critic: Literal["shared", "separate"] = setting(
        "shared", "value head on the policy's backbone, or a model of its own"
    )
    vf_coef: float = setting(0.1, "weight of the value loss", ge=0)
    cliprange: float = setting(0.2, "the probability ratio is clipped to 1 -/+ this", gt=0, lt=1)
    cliprange_value: float = setting(0.2, "new values are clipped to the old ones -/+ this", gt=0)
    dual_clip: float | None = setting(
        None, "bound of the loss of a negative advantage, in advantages; empty: none", gt=1
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", ge=0)
    gamma: float = setting(1.0, "discount", gt=0, le=1)
    lam: float = setting(0.95, "lambda of generalised advantage estimation", ge=0, le=1)
    whiten_rewards: bool = setting(False, "scale the rewards of a rollout to variance 1")

    guard_max_kl: float | None = setting(None, "stop above this KL, in nats per completion; empty: never", gt=0)
    guard_min_eos_rate: float | None = setting(None, "stop below this share of ended completions", gt=0, le=1)
    guard_min_entropy: float | None = setting(None, "stop below this entropy, in nats per token", gt=0)

    generation_batch_size: int = knob(64, "completions a process samples at once", gt=0)
    eval_steps: int = knob(
        10, "iterations between two evaluations; there is one before the first and after the last", gt=0
    )
    save_steps: int = knob(10, "iterations between two checkpoints", gt=0)

    @property
    def num_iterations(self) -> int:
        """Rollouts until `total_episodes` are reached."""
        return math.ceil(self.total_episodes / self.rollout_batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> PPOConfig:
        if self.num_mini_batches > self.rollout_batch_size:
            raise ValueError(
                f"num_mini_batches {self.num_mini_batches} is more than rollout_batch_size {self.rollout_batch_size}"
            )
        return self
