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

    gradient_checkpointing: bool = setting(False, "compute activations again in the backward: less memory, slower")

    max_new_tokens: int = setting(53, "longest completion in tokens, the stop token included", gt=0)
    long_prompts: Literal["refuse", "truncate", "drop"] = setting(
        "refuse", "prompts that leave no room for max_new_tokens: an error, cut at their start, or left out"
    )
    temperature: float = setting(0.7, "of sampling, and of every log-probability", gt=0)
    stop_strings: list[str] = setting([], "texts that end a completion, beside the stop tokens")
    missing_eos_penalty: float = setting(1.0, "taken from the score of a completion without a stop token", ge=0)
    truncation: Literal["terminal", "bootstrap", "mask"] = setting(
        "terminal", "a completion without a stop token ends there, goes on with the critic's value, or teaches nothing"
    )

    reward_weights: list[float] | None = setting(None, "a weight for each of several rewards; empty: 1")
    reward_aggregation: Literal["sum", "mean", "min", "mean_minus_variance"] = setting(
        "sum", "how several rewards make one score; an ensemble of reward models is taken by one of the others"
    )
    reward_variance_coef: float = setting(1.0, "weight of the variance in mean_minus_variance", ge=0)
    use_score_norm: bool = setting(False, "scores less the mean of all so far, over their standard deviation")
    score_clip: float | None = setting(None, "scores are kept within -/+ this, after use_score_norm; empty: any", gt=0)

    kl_coef: float = setting(0.05, "price of a nat of KL from the reference", ge=0)
    kl_placement: Literal["reward", "loss"] = setting("reward", "where the KL is priced")
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k1", "of the priced KL: k1 in the reward, k2 or k3 in the loss")
    adaptive_kl_target: float | None = setting(
        None, "nats per completion that an adaptive kl_coef steers to; empty: fixed", gt=0
    )
    adaptive_kl_horizon: int = setting(10_000, "episodes over which the adaptive kl_coef adjusts", gt=0)
    ref_model_mixup_alpha: float = setting(
        0.0, "share of the way that the reference moves to the policy after each iteration", ge=0, le=1
    )

    advantage_estimator: Literal["gae", "rloo"] = setting(
        "gae", "by a critic, or REINFORCE with the prompt's other completions as baseline and no critic"
    )
    num_generations: int | None = setting(None, "completions drawn for each prompt; empty: 1, with rloo 4", gt=0)
    critic: Literal["shared", "separate"] = setting(
        "shared", "value head on the policy's backbone, or a model of its own"
    )
    vf_coef: float = setting(0.1, "weight of the value loss", ge=0)
    cliprange: float = setting(0.2, "the probability ratio is clipped to 1 -/+ this", gt=0, lt=1)
    cliprange_value: float = setting(0.2, "new values are clipped to the old ones -/+ this", gt=0)
    dual_clip: float | None = setting(
        None, "bound of the loss of a negative advantage, in advantages; empty: none", gt=1
    )
    target_kl: float | None = setting(
        None, "an iteration's updates end once the KL of a mini-batch from the rollout is over 1.5 x this", gt=0
    )
    importance_sampling_cap: float | None = setting(
        None, "weigh tokens by policy over sampler, at most this, where the two differ; empty: no weights", gt=0
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", ge=0)
    ptx_coef: float = setting(0.0, "weight of the language modelling loss on ptx_dataset (PPO-ptx)", ge=0)
    gamma: float = setting(1.0, "discount", gt=0, le=1)
    lam: float = setting(0.95, "lambda of generalised advantage estimation", ge=0, le=1)
    whiten_rewards: bool = setting(False, "scale the rewards of a rollout to variance 1")

    guard_max_kl: float | None = setting(None, "stop above this KL, in nats per completion; empty: never", gt=0)
    guard_min_eos_rate: float | None = setting(None, "stop below this share of ended completions", gt=0, le=1)
    guard_min_entropy: float | None = setting(None, "stop below this entropy, in nats per token", gt=0)

    one_step_off_policy: bool = setting(
        False, "draw each rollout one iteration ahead, by the policy that has not learnt from the one before it"
    )
    use_vllm: bool = setting(False, "sample by vLLM")
    vllm_mode: Literal["colocate", "server"] = setting(
        "colocate", "an engine in each process on its GPU, or a server on GPUs of its own"
    )
    vllm_gpu_memory_utilization: float = knob(0.3, "colocate: share of the GPU's memory for the engine", gt=0, lt=1)
    vllm_enable_sleep_mode: bool = knob(True, "colocate: the engine gives its memory back between rollouts")
    vllm_server_base_url: str | None = knob(
        None, "server: its address; empty: http://vllm_server_host:vllm_server_port"
    )
    vllm_server_host: str = knob("0.0.0.0", "server: the machine it is on")
    vllm_server_port: int = knob(8000, "server: the port it listens on", gt=0)
    vllm_server_timeout: float = knob(240.0, "server: seconds to wait until it is up", ge=0)
    vllm_group_port: int = knob(51216, "server: the port here where it fetches the weights", gt=0)
    reward_timeout_seconds: float = knob(60.0, "how long a reward server may take to answer", gt=0)
    reward_max_retries: int = knob(3, "how often a reward server that fails is asked again", ge=0)
    generation_batch_size: int = knob(64, "completions a process samples at once", gt=0)
    eval_steps: int = knob(
        10, "iterations between two evaluations; there is one before the first and after the last", gt=0
    )
    save_steps: int = knob(10, "iterations between two checkpoints", gt=0)

    @property
    def num_iterations(self) -> int:
        """Rollouts until `total_episodes` are reached."""
        return math.ceil(self.total_episodes / self.rollout_batch_size)

    @property
    def completions_per_prompt(self) -> int:
        """`num_generations`, or what it is when empty."""
        return self.num_generations or (4 if self.advantage_estimator == "rloo" else 1)

    @model_validator(mode="after")
    def _consistent(self) -> PPOConfig:
        rloo, group = self.advantage_estimator == "rloo", self.completions_per_prompt
        conflicts = [
            (
                self.num_mini_batches > self.rollout_batch_size,
                f"num_mini_batches {self.num_mini_batches} is more than rollout_batch_size {self.rollout_batch_size}",
            ),
            (
                self.rollout_batch_size % group,
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of the {group} completions of each "
                "prompt (num_generations)",
            ),
            (
                self.kl_placement == "loss" and self.kl_estimator == "k1",
                "kl_placement loss and kl_estimator k1: k1 has no gradient there; use k2 (or k3), or kl_placement "
                "reward",
            ),
            (
                self.kl_placement == "reward" and self.kl_estimator != "k1",
                f"kl_placement reward and kl_estimator {self.kl_estimator}: there k2 has another optimum than the KL "
                "and k3 none; use k1, or kl_placement loss",
            ),
            (
                self.truncation != "terminal" and self.missing_eos_penalty,
                f"truncation {self.truncation} and missing_eos_penalty {self.missing_eos_penalty}: a completion cut "
                "off has no score then to take a penalty from; set missing_eos_penalty 0, or truncation terminal",
            ),
            (
                self.reward_weights is not None and self.reward_aggregation != "sum",
                f"reward_weights and reward_aggregation {self.reward_aggregation}: only a sum is weighed; leave one of "
                "them out",
            ),
            (
                self.use_vllm and self.importance_sampling_cap is None,
                "use_vllm without importance_sampling_cap: the engine's probabilities differ from the trainer's, and "
                "each token has to be weighed; set importance_sampling_cap, usually 2",
            ),
            (
                self.one_step_off_policy and self.importance_sampling_cap is None,
                "one_step_off_policy without importance_sampling_cap: completions are those of an older policy, and "
                "each token has to be weighed; set importance_sampling_cap, usually 2",
            ),
            (
                self.vllm_mode == "server" and not self.use_vllm,
                "vllm_mode server and use_vllm false: nothing is sampled by the server; set use_vllm true, or leave "
                "vllm_mode out",
            ),
            (
                self.adaptive_kl_target is not None and not self.kl_coef,
                f"adaptive_kl_target {self.adaptive_kl_target} and kl_coef 0: it is multiplied, and stays 0; set "
                "kl_coef above 0",
            ),
            (
                self.adaptive_kl_target is not None and self.rollout_batch_size >= 5 * self.adaptive_kl_horizon,
                f"adaptive_kl_horizon {self.adaptive_kl_horizon} and rollout_batch_size {self.rollout_batch_size}: one "
                "iteration could take the whole price away; set the horizon above a fifth of the batch",
            ),
            (
                rloo and group < 2,
                "advantage_estimator rloo and num_generations 1: it compares completions of a prompt; use 2 or more",
            ),
            (
                rloo and self.critic == "separate",
                "advantage_estimator rloo and critic separate: rloo has no critic; leave one of them out",
            ),
            (
                rloo and self.truncation == "bootstrap",
                "advantage_estimator rloo and truncation bootstrap: rloo has no critic to take the value from; use "
                "truncation terminal or mask",
            ),
            (
                rloo and self.gamma != 1,
                f"advantage_estimator rloo and gamma {self.gamma}: rloo does not discount; leave one of them out",
            ),
            (
                rloo and self.whiten_rewards,
                "advantage_estimator rloo and whiten_rewards: rloo has one reward a completion; leave one of them out",
            ),
        ]
        if found := [text for holds, text in conflicts if holds]:
            raise ValueError("\n".join(found))
        return self
