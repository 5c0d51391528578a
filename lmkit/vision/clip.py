"""Images and captions in one space: two towers trained so that a picture is nearest to what is said of it.

Radford et al. 2021, Learning transferable visual models from natural language supervision (arXiv:2103.00020). The
model is transformers' `VisionTextDualEncoderModel`: a directory of it loads by that class once this module is imported,
which is what knows the two towers below. `preprocess.json` and the tokenizer lie beside the weights.

Shapes: B pairs, N images, T tokens, D width of the common space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmkit.errors import BadInput
from lmkit.model_files import check_model_files
from lmkit.models.load import load_language_model
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.byte_level import make_encoder
from lmkit.tokenization.read import load_tokenizer
from lmkit.tokenization.train import train_tokenizer
from lmkit.vision.augment import random_views
from lmkit.vision.classifier import ImageNetworkConfig, channels_last, pooled
from lmkit.vision.cnn import build_network
from lmkit.vision.options import FILE, Augment, Preprocess
from lmkit.vision.pixels import normalize

MAX_LOG_SCALE = math.log(100)  # the paper's bound: a sharper temperature made its training unstable


class ImageTower(PreTrainedModel):
    """The body of a network of `lmkit.vision.cnn`: `pixel_values` [B, C, S, S] to `pooler_output` [B, width]."""

    config_class = ImageNetworkConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ImageNetworkConfig):
        super().__init__(config)
        self.body, _ = build_network(config.network, config.num_channels, config.image_size, 2).children()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation stands."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        features = self.body(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled(features))


class TextTowerConfig(PreTrainedConfig):
    """language_model: the configuration of a causal language model, as `to_dict` gives it."""

    model_type = "lmkit_text_tower"

    language_model: dict[str, Any] | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return AutoConfig.for_model(**self.language_model).hidden_size


class TextTower(PreTrainedModel):
    """A causal language model that has read a caption: its state at the last token, which has seen all the others."""

    config_class = TextTowerConfig
    main_input_name = "input_ids"

    def __init__(self, config: TextTowerConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.language_model = language_model or AutoModel.from_config(AutoConfig.for_model(**config.language_model))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        # No token sees what follows it, so padding on the right needs no mask inside the model.
        hidden = self.language_model(input_ids=input_ids, use_cache=False).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, attention_mask.sum(1) - 1]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=last)


AutoModel.register(ImageNetworkConfig, ImageTower)
AutoConfig.register(TextTowerConfig.model_type, TextTowerConfig)
AutoModel.register(TextTowerConfig, TextTower)


# ------------------------------------------------------------------------------------------------- the two towers


def image_tower(network: str, preprocess: Preprocess) -> PreTrainedModel:
    """A network of `lmkit.vision.cnn` by name, or `hf:PATH`: a classifier of lmkit, a ViT and what gives as it does.

    Raises BadInput for a directory whose model gives no pooled state [B, hidden_size] for these images, and for a
    classifier that learnt from images of another size, colour or way to a square.
    """
    kind, _, name = network.partition(":")
    if kind != "hf" or not name:
        sizes = {"num_channels": preprocess.channels, "image_size": preprocess.size}
        return ImageTower(ImageNetworkConfig(network=network, **sizes))
    check_model_files(Path(name))
    if (Path(name) / FILE).is_file():
        same = {"size", "channels", "resize"}
        learnt, given = (one.model_dump(include=same) for one in (Preprocess.load(Path(name)), preprocess))
        if learnt != given:
            raise BadInput(f"{name} learnt from images with {learnt}, and preprocess has {given}. Set them to its own.")
    tower = AutoModel.from_pretrained(name, local_files_only=True, dtype=torch.float32)
    try:
        with torch.no_grad():
            images = torch.zeros(1, preprocess.channels, preprocess.size, preprocess.size)
            found = tuple(tower.eval()(pixel_values=images).pooler_output.shape)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        found = f"an error ({str(error).splitlines()[0]})"
    wanted = (1, getattr(tower.config, "hidden_size", "hidden_size"))
    if found != wanted:
        raise BadInput(
            f"{name} is a {type(tower).__name__}, and gives {found} for one image of {preprocess.channels} x "
            f"{preprocess.size} x {preprocess.size} where a tower gives pooler_output {wanted}. Set preprocess.size "
            "and channels to its own, or take a classifier of lmkit or a ViT."
        )
    return tower.train()


def language_model(
    source: Path | None, new: ModelConfig, captions: Sequence[str], vocab_size: int, length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What the text tower is made of, and its tokenizer, which cuts captions at `length` tokens.

    source: the directory of a causal language model, or of a pair of towers, whose text tower has learnt what captions
    say of images; None: a `new` one, its tokenizer trained on the captions.
    """
    if source is not None and is_clip(source):
        pair, tokenizer, _ = load_clip(source)
        if not isinstance(pair.text_model, TextTower):
            raise BadInput(f"{source} has a {type(pair.text_model).__name__} for texts; wanted towers of clip.py.")
        model = pair.text_model.language_model
    elif source is not None:
        model, tokenizer = load_language_model(source)
        if model.base_model is model:
            raise BadInput(
                f"{source} is a {type(model).__name__}, whose states are not given apart. Take a Transformer."
            )
    else:
        tokenizer = train_tokenizer(lambda: captions, vocab_size=vocab_size, allow_smaller_vocab=True)
        model = build_model(new, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", length)
    if length > positions:
        raise BadInput(f"caption_length {length} is more than the text model's {positions} positions. Lower it.")
    tokenizer.model_max_length = length
    return model, tokenizer


def pair_towers(images: PreTrainedModel, language: PreTrainedModel, width: int) -> VisionTextDualEncoderModel:
    """The model of an image tower and a causal language model, with new projections into a space of `width`."""
    texts = TextTower(TextTowerConfig(language_model=language.config.to_dict()), language.base_model)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(images.config, texts.config, projection_dim=width)
    return VisionTextDualEncoderModel(config, images, texts)


def caption_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """(ids int64 [N, T], mask bool [N, T], how many were cut): each text and an end of text.

    Texts are cut to `tokenizer.model_max_length` tokens; the name of a special token in a text is spelled out.
    """
    length = tokenizer.model_max_length
    found = make_encoder(tokenizer.backend_tokenizer.to_str(), fast=False)(list(texts))
    rows = [[*ids[: length - 1], tokenizer.eos_token_id] for ids in found]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(tokens)] for tokens in rows])
    return ids, mask, sum(len(ids) >= length for ids in found)


def save_clip(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess) -> None:
    """Writes weights, tokenizer and preprocessing of a trained pair of towers into one directory."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocess.save(folder)


def load_clip(path: Path) -> tuple[VisionTextDualEncoderModel, PreTrainedTokenizerBase, Preprocess]:
    """(the model in eval mode, its tokenizer, how it sees images). BadInput when a part is missing or does not fit."""
    path = Path(path)
    check_model_files(path)
    if not is_clip(path):
        raise BadInput(f"{path} holds no image and text towers; wanted what recipes/vision/clip.py writes.")
    tokenizer, preprocess = load_tokenizer(path), Preprocess.load(path)
    model = VisionTextDualEncoderModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    rows = model.text_model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise BadInput(
            f"{path} holds a text tower with {rows:,} token embeddings and a tokenizer with {len(tokenizer):,} tokens; "
            "they do not belong together. Put the tokenizer it was trained with there."
        )
    return channels_last(model.eval()), tokenizer, preprocess


def is_clip(path: Path) -> bool:
    """Whether a directory holds a pair of towers."""
    config = Path(path) / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return found.get("model_type") == VisionTextDualEncoderConfig.model_type


# -------------------------------------------------------------------------------------------------------- training


class _Gathered(torch.autograd.Function):
    """The rows of all processes, in their order; what comes back for a row is summed over all who used it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean over this process's pairs of the cross entropy of finding one's partner.

        (CE(s i_k . t_all, k) + CE(s t_k . i_all, k)) / 2,    s = exp(log_scale), i and t of length 1

    images, texts: [B, D], row k of one belongs to row k of the other; every process has as many. The candidates are
    the pairs of all processes: the sum of the processes' losses is B times the loss of one process with all pairs,
    and has its gradient. In float32, also under autocast (Radford et al. 2021, figure 3).

    >>> contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(0.0))  # ln(1 + 1/e)
    tensor(0.3133)
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
        all_images, all_texts, own = images, texts, torch.arange(len(images), device=images.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            all_images, all_texts = _Gathered.apply(images), _Gathered.apply(texts)
            own = own + dist.get_rank() * len(images)
        scale = log_scale.float().exp()
        found = F.cross_entropy(scale * images @ all_texts.T, own) + F.cross_entropy(scale * texts @ all_images.T, own)
    return found / 2


class Contrast(nn.Module):
    """What the training loop trains: pixels and captions to B times the loss, and B.

    pixels: uint8 [B, C, S, S]; input_ids, attention_mask: [B, T]. In training, images are varied at random.
    """

    def __init__(self, model: VisionTextDualEncoderModel, preprocess: Preprocess, augment: Augment):
        super().__init__()
        self.model, self.preprocess, self.augment = channels_last(model), preprocess, augment

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.float()
        if self.training:
            images = random_views(images, self.augment)
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=MAX_LOG_SCALE)
        images = channels_last(normalize(images, self.preprocess))
        seen = self.model.get_image_features(pixel_values=images).pooler_output
        read = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        loss = contrastive_loss(seen, read, self.model.logit_scale)
        return loss * len(pixels), torch.tensor(float(len(pixels)), device=loss.device)
