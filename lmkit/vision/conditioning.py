"""What an image is drawn after: a caption, a class, or nothing.

A conditioner turns words into tensors of a batch (`tensors`), knows the same for no words (`empty`), and as a module
turns such a batch into the arguments of a network, under the names diffusers gives them.

Shapes: B images, T tokens, W width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig
from lmkit.vision.clip import caption_ids, language_model
from lmkit.vision.data import Example, classification_splits, read_images, stratified
from lmkit.vision.match import captioned_splits

Batch = dict[str, Tensor]


class Captions(nn.Module):
    """Captions, read by a Transformer of the language side: the network attends to its state at every token.

    The empty caption, an end of text alone, stands for no condition. An encoder whose configuration says `is_causal`
    false reads in both directions, so that the first digit of "a three left of a seven" knows on which side it stands.
    """

    kind = "text"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, frozen: bool = False):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        if frozen:
            encoder.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.encoder.config.hidden_size

    def tensors(self, captions: Sequence[str]) -> Batch:
        """input_ids int64 [B, T] and attention_mask bool [B, T]. BadInput for a caption that would be cut."""
        ids, mask, num_cut = caption_ids(self.tokenizer, captions)
        if num_cut:
            length = self.tokenizer.model_max_length
            raise BadInput(f"{num_cut} captions have {length} tokens or more. Shorten them, or raise caption_length.")
        return {"input_ids": ids, "attention_mask": mask}

    def empty(self, batch: Batch) -> Batch:
        """Empty captions, as many and as long."""
        ids = torch.full_like(batch["input_ids"], self.tokenizer.pad_token_id)
        mask = torch.zeros_like(batch["attention_mask"])
        ids[:, 0], mask[:, 0] = self.tokenizer.eos_token_id, True
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Batch:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": attention_mask}


class Classes(nn.Module):
    """Class names; the network has an embedding of each, and one more for no class."""

    kind = "class"

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = list(names)

    def tensors(self, names: Sequence[str]) -> Batch:
        """class_labels int64 [B]. BadInput for a name that is none."""
        if unknown := sorted(set(names) - set(self.names)):
            raise BadInput(f"the model knows no class {', '.join(unknown)}. It knows {', '.join(self.names)}.")
        return {"class_labels": torch.tensor([self.names.index(name) for name in names])}

    def empty(self, batch: Batch) -> Batch:
        return {"class_labels": torch.full_like(batch["class_labels"], len(self.names))}

    def forward(self, class_labels: Tensor) -> Batch:
        return {"class_labels": class_labels}


class Unconditional(nn.Module):
    """Nothing."""

    kind = "none"

    def tensors(self, words: Sequence[str]) -> Batch:
        """No tensors. BadInput when there are words."""
        if any(words):
            raise BadInput(f"the model draws after nothing, but was told {words[0]!r}. Leave the words out.")
        return {}

    def empty(self, batch: Batch) -> Batch:
        return {}

    def forward(self) -> Batch:
        return {}


Conditioner = Captions | Classes | Unconditional


def without_some(conditioner: Conditioner, batch: Batch, dropped: Tensor) -> Batch:
    """`batch` with the rows empty where `dropped`, bool [B], is True."""
    empty = conditioner.empty(batch)
    rows = {name: dropped.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    return {name: torch.where(rows[name], empty[name], tensor) for name, tensor in batch.items()}


def new_conditioner(
    kind: str, words: Sequence[str], source: Path | None, new: ModelConfig, vocab_size: int, length: int, frozen: bool
) -> Conditioner:
    """A conditioner for training on images with `words`.

    Captions are read by the language model, or text tower, of the directory `source`, in the direction it was trained
    in; without one by a `new` one that reads both ways, its tokenizer trained on them.
    """
    if kind != "text":
        return Classes(sorted(set(words))) if kind == "class" else Unconditional()
    model, tokenizer = language_model(source, new, words, vocab_size, length)
    if source is None:
        model.base_model.config.is_causal = False
    return Captions(tokenizer, model.base_model, frozen)


def words_of(examples: Sequence[Example], kind: str) -> list[str]:
    """What each image is drawn after."""
    return [{"text": e.caption, "class": e.label, "none": ""}[kind] for e in examples]


def conditioned_splits(
    source: str, kind: str, caption: str | None, test_fraction: float, seed: int
) -> dict[str, list[Example]]:
    """train and test of a source of images; BadInput where one lacks the caption or class that `kind` asks for."""
    if kind == "text":
        return captioned_splits(source, caption, test_fraction, seed)
    if kind == "class":
        return classification_splits(source, None, {"test": test_fraction, "validation": 0.0}, None, seed)[0]
    splits = read_images(source)
    if "train" not in splits:
        raise BadInput(f"{source} has the splits {', '.join(splits)} and no train.")
    test = splits.get("test", splits.get("validation"))
    train, test = stratified(splits["train"], test_fraction, seed) if test is None else (splits["train"], test)
    return {"train": train, "test": test}
