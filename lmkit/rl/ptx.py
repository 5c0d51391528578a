"""PPO-ptx: the language modelling loss of other text mixed into each update, against forgetting it.

Ouyang et al., arXiv:2203.02155, section 3.5. Both losses are means over tokens here: with `ptx_coef` 1 the text has the
weight of the completions, however long either is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.data.blocks import Blocks
from lmkit.data.encode import encode_demonstrations
from lmkit.data.shards import Shards
from lmkit.data.sources import load_demonstrations
from lmkit.errors import BadInput
from lmkit.rl.config import PPOConfig


class Text(Protocol):
    """Numbered samples: `lmkit.data.blocks.Blocks` of token shards, or `Demonstrations`."""

    def __len__(self) -> int: ...

    def fetch(self, numbers: np.ndarray) -> Mapping[str, Tensor]:
        """input_ids [B, T] and labels [B, T]: the next token, or -100 where it does not count."""


class Demonstrations:
    """Rows with `input_ids` and `labels` (aligned, -100 on the prompt) as `encode_demonstrations` makes them."""

    def __init__(self, rows: Dataset):
        if not {"input_ids", "labels"} <= set(rows.column_names) or not len(rows):
            raise BadInput(
                f"ptx_dataset has {len(rows)} rows of {rows.column_names}; wanted rows with input_ids and labels, as "
                "lmkit.data.encode.encode_demonstrations gives, or lmkit.data.blocks.Blocks."
            )
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        rows = self.rows[numbers.tolist()]
        input_ids = pad_sequence([torch.tensor(ids[:-1]) for ids in rows["input_ids"]], batch_first=True)
        labels = [torch.tensor(labels[1:]) for labels in rows["labels"]]
        return {"input_ids": input_ids, "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def load_text(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Token shards (the folder of one split, made with the same tokenizer), or demonstrations of which those fit."""
    positions = getattr(model.config, "max_position_embeddings", 1024)
    if (Path(source) / "meta.json").is_file():
        shards = Shards.open(source)
        shards.check_tokenizer(tokenizer)
        return Blocks(shards, positions)
    return Demonstrations(encode_demonstrations(load_demonstrations(source), tokenizer, positions)[0])


def mixed_in(ptx_dataset: Dataset | Text | None, ptx_coef: float) -> Text | None:
    """What a trainer was given to mix in; BadInput where it has text without a weight, or a weight without text."""
    if (ptx_dataset is None) != (ptx_coef == 0):
        missing = "no ptx_dataset is given" if ptx_dataset is None else "a ptx_dataset is given"
        raise BadInput(f"ptx_coef is {ptx_coef} and {missing}; give both of them, or neither.")
    return Demonstrations(ptx_dataset) if isinstance(ptx_dataset, Dataset) else ptx_dataset


def add_gradients(
    batch: Mapping[str, Tensor], model: torch.nn.Module, config: PPOConfig, accelerator: Accelerator
) -> float:
    """Adds the gradient of ptx_coef x the mean cross-entropy, over the tokens of all processes; the mean, in nats.

    batch: this process's input_ids and labels. The gradients are left to be exchanged with those of the completions.
    """
    counts = batch["labels"] != -100
    num_tokens = accelerator.reduce(counts.sum().to(accelerator.device), reduction="sum").item()
    loss_sum = torch.zeros((), device=accelerator.device)
    for rows in torch.arange(len(counts)).split(config.per_device_train_batch_size):
        inputs = batch["input_ids"][rows], counts[rows], batch["labels"][rows][counts[rows]]
        with accelerator.no_sync(model):
            logprobs, _, _ = model(*(tensor.to(accelerator.device) for tensor in inputs), 1.0, False, with_values=False)
            accelerator.backward(-config.ptx_coef * logprobs.sum() * accelerator.num_processes / num_tokens)
        loss_sum -= logprobs.detach().sum()
    return accelerator.reduce(loss_sum, reduction="sum").item() / num_tokens
