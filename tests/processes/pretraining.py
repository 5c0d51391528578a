"""Tasks of test_pretrain.py: the training loop on a small language model, in as many processes as there are."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from lmkit.config import StageConfig
from lmkit.errors import Interrupted, Stopped
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.stage import Stage
from lmkit.training import checkpoint, loop, sharding
from lmkit.training.ema import EMA
from lmkit.training.losses import CausalLMLoss
from lmkit.training.options import TrainConfig

BASE = {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 2, "warmup_steps": 2}
BASE |= {"learning_rate": 2e-3, "logging_steps": 1, "eval_steps": 3}
NUM_SAMPLES = 7  # fewer than a batch, so that a batch reaches into the next epoch


class OneStage(Stage):
    """A stage that is asked to stop after some updates."""

    def __init__(self, directory, stop_after):
        super().__init__("toy", StageConfig(output_dir=directory))
        self.stop_after, self.asked = stop_after, 0

    def stop_requested(self):
        self.asked += 1
        return self.asked == self.stop_after


def small_model():
    torch.manual_seed(0)
    sizes = {"preset": "nano", "num_hidden_layers": 2, "context_length": 16}
    return AutoModelForCausalLM.from_config(transformers_config(ModelConfig(**sizes), 64))


def fetch(numbers):
    """Rows with different numbers of counted tokens: sample n has n of them, sample 0 none."""
    rows = torch.stack([torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(int(n))) for n in numbers])
    labels = rows[:, 1:].clone()
    for label, number in zip(labels, numbers):
        label[number:] = -100
    return {"input_ids": rows[:, :-1], "labels": labels}


def fit(directory, stop_after=None, in_bfloat16=False, ema=None, **changes):
    """Trains in `directory`; the main process leaves what came out in result.pt."""
    directory = Path(directory)
    # Newton-Schulz in bfloat16 turns a difference of one rounding into one of 2^-9 of the update; here in float32.
    bfloat16, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, lambda tensor: tensor
    kept, prepare = [], sharding.prepare
    sharding.prepare = lambda *given: kept.append(prepare(*given)) or kept[0]
    AcceleratorState._reset_state()  # Accelerate remembers its first precision
    accelerator = loop.make_accelerator(in_bfloat16, 64)
    module, average, seen = CausalLMLoss(small_model()), EMA(ema) if ema else None, []

    def evaluate():
        with torch.no_grad():
            total, count = module(**fetch(range(7)))  # plain, in a number of forwards of its own for each process
            for _ in range(accelerator.process_index):
                module(**fetch(range(2)))
        seen.append((total / count).item())
        return {"eval/loss": seen[-1]}

    config = TrainConfig.model_validate(BASE | changes)
    with contextlib.suppress(Interrupted), OneStage(directory, stop_after) as stage:
        options = {"evaluate": evaluate, "ema": average}
        loop.fit(module, fetch, NUM_SAMPLES, config, accelerator=accelerator, stage=stage, **options)
        result = {"model": module.state_dict(), "seen": seen, "empty": sharding.is_empty(module)}
        own = sum(getattr(p, "_local_tensor", p).numel() for p in kept[0].parameters())
        result["share"] = own / sum(p.numel() for p in module.parameters())
        if average is not None:
            with average.applied():
                result["ema"] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if accelerator.is_main_process:
            torch.save(result, directory / "result.pt")
    torch.Tensor.bfloat16, sharding.prepare = bfloat16, prepare


def spoilt(folder):
    """A weight that is not finite in the second process's share alone is seen by both."""
    module = CausalLMLoss(small_model())
    prepared = sharding.prepare(module, loop.make_accelerator(False, 64))
    checkpoint.check_finite(dict(prepared.named_parameters()))
    weight = prepared.model.model.layers[1].mlp.up_proj.weight
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            weight.to_local()[0, 0] = math.inf
    with pytest.raises(Stopped, match="up_proj"):
        checkpoint.check_finite(dict(prepared.named_parameters()))


def fits(folder, cases):
    """Several runs after each other in the same processes: name -> options of `fit`."""
    for name, options in cases.items():
        fit(folder / name, **options)
