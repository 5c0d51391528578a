"""What a trainer has learnt and what it has logged, for tests that compare two runs to the bit."""

import json

import torch

TIMED = ("seconds", "time/", "perf/", "tokens_per_second")


def state(trainer):
    """All weights that training moves, the moving reference's with them."""
    parts = [trainer.actor_critic] + ([trainer.roles.reference] if trainer.roles.reference is not None else [])
    return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def logged(trainer):
    """The rows of metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]
