"""What a PPO run needs to go on as if it had never stopped, in one checkpoint between two iterations.

Random choices are derived from the seed, the iteration and the purpose, and the learning rates and the next prompts
from the iteration, so none of them has a state of its own. A model's frozen tensors are those it was made with and are
not written; a reference that moves is. So are completions drawn ahead, since the weights that drew them are gone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.errors import BadInput
from lmkit.generation.sampler import Completions
from lmkit.training import checkpoint


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None, ahead: Completions | None
) -> dict[str, dict[str, Tensor]]:
    """Policy, critic, optimiser, torch's generators, and the reference and completions that are given. All processes
    call it."""
    trained, tensors = _trained_names(model), checkpoint.model_tensors(model)
    tensors = {
        "model": {name: tensor for name, tensor in tensors.items() if name in trained},
        "optimizer": checkpoint.optimizer_tensors(model, [optimizer]),
        "random": checkpoint.random_tensors(),
    }
    if reference is not None:
        tensors["reference"] = dict(reference.state_dict())
    if ahead is not None:
        stopped = torch.tensor([reason == "stop" for reason in ahead.finish_reasons])
        tensors["ahead"] = {"tokens": ahead.tokens, "lengths": ahead.lengths, "logprobs": ahead.logprobs}
        tensors["ahead"]["stopped"] = stopped
    return tensors


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None, rank: int
) -> tuple[dict[str, Any], Completions | None]:
    """Sets what `gather` collected, in every process; the rest of the checkpoint's state, and completions in it."""
    tensors, state = checkpoint.load(path)
    if different := _trained_names(model) ^ tensors["model"].keys():
        raise BadInput(
            f"{path} is of a run with other trained tensors ({len(different)} differ, such as {min(different)}): "
            "another critic or other adapters. Resume with the options of that run."
        )
    checkpoint.load_model(model, tensors["model"], strict=False)
    checkpoint.load_optimizers(model, [optimizer], tensors["optimizer"])
    checkpoint.load_random(tensors["random"], rank)
    if reference is not None:
        reference.load_state_dict(tensors["reference"])
    ahead = tensors.get("ahead")
    if ahead is not None:
        reasons = ["stop" if flag else "length" for flag in ahead.pop("stopped").tolist()]
        ahead = Completions(**ahead, finish_reasons=reasons)
    return state, ahead


def _trained_names(model):
    # Tied weights have two names of one tensor, and both are in the checkpoint.
    named = getattr(model, "module", model).named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}
