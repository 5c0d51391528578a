"""What an iteration uses, as functions of its number: rows, text, learning rates and random generators.

Nothing here has a state, so a checkpoint needs none of it, and what a process takes depends on its number alone.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from lmkit.data.order import shuffled
from lmkit.rl.config import PPOConfig
from lmkit.training.optimizers import schedule


@dataclass(frozen=True)
class Plan:
    """process, num_processes: which of how many asks."""

    config: PPOConfig
    seed: int
    process: int
    num_processes: int

    @property
    def updates_per_iteration(self) -> int:
        return self.config.num_ppo_epochs * self.config.num_mini_batches

    def rows(self, iteration: int, num_rows: int) -> list[int]:
        """This process's prompts of an iteration, each as often as it gets completions.

        They are the next of an endless shuffled pass over `num_rows` rows.
        """
        group = self.config.completions_per_prompt
        share = self.config.rollout_batch_size // group // self.num_processes
        first = iteration * self.config.rollout_batch_size // group + self.process * share
        return shuffled(np.arange(first, first + share), num_rows, self.seed).repeat(group).tolist()

    def text(self, iteration: int, step: int, num_rows: int) -> np.ndarray:
        """The rows of text mixed into an update, as many as a mini-batch has completions: the next of such a pass."""
        update = iteration * self.updates_per_iteration + step
        share = max(1, self.config.rollout_batch_size // self.config.num_mini_batches // self.num_processes)
        first = (update * self.num_processes + self.process) * share
        return shuffled(np.arange(first, first + share), num_rows, self.seed)

    def rates(self, iteration: int) -> list[float]:
        """The factor on the learning rates at each update of an iteration."""
        config, each = self.config, self.updates_per_iteration
        kind = "wsd" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
        options = {"warmup_steps": config.warmup_steps, "max_steps": config.num_iterations * each}
        return [schedule(kind, iteration * each + step, **options, decay_fraction=0.0) for step in range(each)]

    def generator(self, purpose: str, iteration: int) -> torch.Generator:
        """A generator for one purpose in one iteration and process; evaluation draws the same in all iterations."""
        key = f"{self.seed}/{purpose}/{0 if purpose == 'evaluation' else iteration}/{self.process}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
