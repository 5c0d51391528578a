"""One number sets a training: batch, learning rate and length that belong to a model's depth."""

from __future__ import annotations

import math

from lmkit.models.presets import ModelConfig
from lmkit.training.options import TrainConfig

TOKENS_PER_WEIGHT = 12
REFERENCE_DEPTH, REFERENCE_BATCH_TOKENS = 12, 2**19


def by_depth(train: TrainConfig, model: ModelConfig, vocab_size: int, num_processes: int) -> TrainConfig:
    """`train` with max_steps, global_batch_size and learning_rate set from `model.depth`; no depth leaves it as it is.

    nanochat's rules (scripts/base_train.py), N counting the matrices and the output layer:
      tokens      D = 12 N
      batch       B = 2^19 (D / D of depth 12)^0.383 tokens, to the nearest power of two (arXiv:2505.13738)
      rate        0.1 / sqrt(width) sqrt(B / 2^19): the root mean square of nanochat's Muon update at its rate of 0.02,
                  in the units of `lmkit.training.optimizers.Muon`
    They were measured there with other data and another architecture. What of the three differs from its default is
    the user's and stays; a per_device_train_batch_size above a process's share of the batch is lowered to it.
    """
    if model.depth is None:
        return train
    sizes, default = model.sizes(), TrainConfig()
    weights = model.num_matrix_weights(vocab_size)
    reference = ModelConfig(depth=REFERENCE_DEPTH, arch=model.arch).num_matrix_weights(vocab_size)
    batch_tokens = 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * (weights / reference) ** 0.383))
    batch_size = max(num_processes, batch_tokens // sizes["context_length"])
    if train.global_batch_size or train.gradient_accumulation_steps != default.gradient_accumulation_steps:
        batch_size = train.per_device_train_batch_size * train.accumulation(num_processes) * num_processes
    batch_tokens = batch_size * sizes["context_length"]
    rate = 0.1 * sizes["hidden_size"] ** -0.5 * (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    scaled = {
        "max_steps": max(round(TOKENS_PER_WEIGHT * weights / batch_tokens), train.warmup_steps + 1),
        "learning_rate": float(f"{rate:.3g}"),
    }
    changes = {name: value for name, value in scaled.items() if getattr(train, name) == getattr(default, name)}
    changes |= {"global_batch_size": batch_size, "gradient_accumulation_steps": 1}
    changes["per_device_train_batch_size"] = min(train.per_device_train_batch_size, batch_size // num_processes)
    return train.model_copy(update=changes)
