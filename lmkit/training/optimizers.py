"""Optimisers and schedules: Muon for the hidden matrices, AdamW for everything else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

# Quintic iteration whose slope at zero is the largest (Keller Jordan, https://kellerjordan.github.io/posts/muon/).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal factor U V^T of each matrix U S V^T, roughly: singular values end between 0.5 and 1.5.

    matrices: [N, rows, columns]. Newton-Schulz in bf16, all N at once.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def orthogonalize_shared(matrices: Tensor) -> Tensor:
    """`orthogonalize` of matrices [N, rows, columns] whose rows may be shared out among processes, as FSDP2 does.

    Each process gets whole matrices, an Nth of them, by one exchange (all to all), and gives the rows back by another.
    """
    if not isinstance(matrices, DTensor):
        return orthogonalize(matrices)
    mesh, rows = matrices.device_mesh, matrices.placements
    by_matrix = [Shard(0) if placement.is_shard() else placement for placement in rows]
    whole = matrices.bfloat16().redistribute(placements=by_matrix).to_local()
    placed = {"shape": matrices.shape, "stride": matrices.stride(), "run_check": False}
    done = DTensor.from_local(orthogonalize(whole).contiguous(), mesh, by_matrix, **placed)
    return done.redistribute(placements=rows)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a hidden matrix moves equally far (Jordan et al., 2024).

    The update is scaled by 0.2 sqrt(max(rows, columns)), so one learning rate and weight decay serve Muon and AdamW
    (Moonshot, Muon is scalable for LLM training, arXiv:2502.16982). Same arithmetic as
    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, with one batched iteration for all parameters of a shape.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. A parameter whose gradient is None is left out."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalize_shared(torch.stack(nesterov)).to(parameters[0].dtype)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale)


def build_optimizers(
    module: nn.Module,
    optim: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model's trainable parameters. Matrices decay; gains, biases and embeddings do not.

    optim: "muon" (hidden matrices by Muon, the rest by AdamW) or "adamw_torch_fused". A hidden matrix is a
    two-dimensional weight that is neither an embedding (also when it is shared with the output) nor the output layer of
    a language model; the head of a classifier or a reward model is one.
    """
    outer = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for inner in module.modules():
        if callable(head := getattr(inner, "get_output_embeddings", None)) and (layer := head()) is not None:
            outer.add(id(layer.weight))
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in outer]
    hidden = [p for p in matrices if p.ndim == 2] if optim == "muon" else []
    by_muon = set(map(id, hidden))
    groups = [
        {"params": [p for p in matrices if id(p) not in by_muon], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2 or id(p) in outer], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True))
    if hidden:
        optimizers.append(Muon(hidden, lr=learning_rate, weight_decay=weight_decay))
    return optimizers


class Joined(torch.optim.Optimizer):
    """Several optimisers as the one that transformers' Trainer takes: stepped, saved and loaded together.

    Groups and state are theirs and no copies, so that a schedule of this one sets their learning rates.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([group for inner in self.optimizers for group in inner.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:
        """One update of each."""
        for inner in self.optimizers:
            inner.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, to each its part."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for inner in self.optimizers:
            inner.state, inner.param_groups = self.state, list(itertools.islice(groups, len(inner.param_groups)))


def schedule(kind: str, step: int, *, warmup_steps: int, max_steps: int, decay_fraction: float = 0.5) -> float:
    """Factor on the learning rate at update `step` (from 0): linear warmup, then by `kind`.

    wsd: constant, then linear to zero over the last `decay_fraction` of all steps. cosine, linear: down to zero from
    the end of the warmup.

    >>> [schedule("wsd", s, warmup_steps=2, max_steps=10) for s in (0, 1, 5, 7, 9)]
    [0.5, 1.0, 1.0, 0.6, 0.2]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max_steps - step
    if kind == "wsd":
        return min(1.0, left / max(1, round(decay_fraction * max_steps)))
    progress = 1 - left / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
