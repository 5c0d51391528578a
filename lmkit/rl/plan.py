"""What an iteration uses, as functions of its number: rows, text, learning rates and random generators.

Nothing here has a state, so a checkpoint needs none of it, and a run can go on with another number of processes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from lmkit.data.order import shuffled
from lmkit.errors import BadInput
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

    def check(self) -> None:
        """BadInput where a rollout's prompts do not divide among the processes."""
        num_prompts = self.config.rollout_batch_size // self.config.completions_per_prompt
        if num_prompts % self.num_processes:
            raise BadInput(
                f"rollout_batch_size {self.config.rollout_batch_size} is {num_prompts} prompts with "
                f"{self.config.completions_per_prompt} completion(s) each, which do not divide among "
                f"{self.num_processes} processes; make it a multiple."
            )

    def rows(self, iteration: int, num_rows: int) -> list[int]:
        """The prompts of an iteration, of all processes, each as often as it gets completions.

        They are the next of an endless shuffled pass over `num_rows` rows.
        """
        group = self.config.completions_per_prompt
        num_prompts = self.config.rollout_batch_size // group
        first = iteration * num_prompts
        return shuffled(np.arange(first, first + num_prompts), num_rows, self.seed).repeat(group).tolist()

    def part(self, num_rows: int) -> range:
        """The numbers of the rows, of so many, that this process collects; the last processes may have fewer."""
        each, rest = divmod(num_rows, self.num_processes)
        first = self.process * each + min(self.process, rest)
        return range(first, first + each + (self.process < rest))

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

    def generator(self, purpose: str, iteration: int, skip: int = 0) -> torch.Generator:
        """A generator for one purpose in one iteration; evaluation draws the same in all iterations.

        It is the same in all processes, `skip` numbers on: a process leaves out those of the rows before its own, so
        that what a row draws does not depend on how many processes there are.
        """
        key = f"{self.seed}/{purpose}/{0 if purpose == 'evaluation' else iteration}/0"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
        torch.rand(skip, generator=generator)
        return generator
