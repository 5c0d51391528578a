"""An image classifier as a Hugging Face directory: config.json, model.safetensors, preprocess.json.

The networks of `lmkit.vision.cnn` load by `AutoModelForImageClassification` once this module is imported; `hf:PATH`
starts from any image-classification directory of transformers, `timm:NAME` from a timm network where timm imports.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from lmkit.errors import BadInput
from lmkit.vision.augment import mixed, random_views
from lmkit.vision.cnn import build_network
from lmkit.vision.options import Augment, Preprocess
from lmkit.vision.pixels import normalize

Mode = Literal["full", "frozen", "gradual", "lora"]


class ImageNetworkConfig(PreTrainedConfig):
    """network: a name of `lmkit.vision.cnn.NETWORKS`. num_channels, image_size: of the images it reads."""

    model_type = "lmkit_image_network"

    network: str = "resnet18_narrow"
    num_channels: int = 3
    image_size: int = 32

    @property
    def hidden_size(self) -> int:
        """Width of what the head reads."""
        shape = (self.num_channels, self.image_size, self.image_size)
        with torch.device("meta"):
            body, _ = build_network(self.network, *shape[:2], classes=2).children()
            return pooled(body.eval()(torch.zeros(1, *shape))).shape[1]


class ImageNetwork(PreTrainedModel):
    """A network of `lmkit.vision.cnn` as a transformers model: `pixel_values` [B, C, S, S] to `logits` [B, classes]."""

    config_class = ImageNetworkConfig
    base_model_prefix = "body"
    main_input_name = "pixel_values"

    def __init__(self, config: ImageNetworkConfig):
        super().__init__(config)
        self.body, self.head = build_network(
            config.network, config.num_channels, config.image_size, config.num_labels
        ).children()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation is what the published results were reached with."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        logits = self.head(self.body(pixel_values))
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(ImageNetworkConfig.model_type, ImageNetworkConfig)
AutoModelForImageClassification.register(ImageNetworkConfig, ImageNetwork)


def new_classifier(network: str, preprocess: Preprocess, classes: Sequence[str]) -> PreTrainedModel:
    """A classifier for those classes: a network by name, `hf:PATH` or `timm:NAME` with a new head."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    kind, _, name = network.partition(":")
    if kind == "hf" and name:
        return _with_new_head(Path(name), labels)
    if kind == "timm" and name:
        return _timm(name, preprocess, labels)
    sizes = {"num_channels": preprocess.channels, "image_size": preprocess.size}
    return ImageNetwork(ImageNetworkConfig(network=network, **sizes, **labels))


def _with_new_head(path: Path, labels: dict[str, Any]) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} is not a model directory: it has no config.json.")
    options = {"local_files_only": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    return AutoModelForImageClassification.from_pretrained(path, **labels, **options)


def _timm(name: str, preprocess: Preprocess, labels: dict[str, Any]) -> PreTrainedModel:
    try:
        import timm  # noqa: F401 - transformers' wrapper needs it
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    except ImportError as error:
        raise BadInput(
            f"timm:{name} needs timm, which needs a torchvision built for this torch ({error}). Without them use a "
            "network of lmkit.vision.cnn, or hf:PATH."
        ) from error
    options = {"in_chans": preprocess.channels}
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, model_args=options, **labels))


def load_classifier(path: Path) -> tuple[PreTrainedModel, Preprocess, list[str]]:
    """(the model in eval mode, how it sees images, its classes in order). Raises BadInput when a part is missing."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise BadInput(f"{path} is not a model directory: it has no config.json.")
    if "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8")):
        raise BadInput(f"{path / 'config.json'} asks to run code of its own (auto_map), which lmkit does not do.")
    preprocess = Preprocess.load(path)
    try:
        model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"{path} is no image classifier; wanted what recipes/vision/classify.py writes. {reason}"
        ) from None
    return channels_last(model.eval()), preprocess, [model.config.id2label[i] for i in range(model.config.num_labels)]


def with_classes(
    path: Path, classes: Sequence[str], asked: Preprocess | None = None
) -> tuple[PreTrainedModel, Preprocess]:
    """The classifier of a directory for other classes: its body and preprocessing, a head of its own kind, new.

    Raises BadInput where images are `asked` for otherwise than the body saw them.
    """
    model, preprocess, known = load_classifier(path)
    wanted = asked.model_dump(exclude_none=True) if asked else {}
    if other := {name: value for name, value in wanted.items() if getattr(preprocess, name) != value}:
        own = {name: getattr(preprocess, name) for name in other}
        raise BadInput(
            f"{path} saw images with {own}, and preprocess asks for {other}. Leave it out, as its own holds."
        )
    if known == list(classes):
        return model.train(), preprocess
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if not isinstance(model, ImageNetwork):
        return _with_new_head(path, labels).train(), preprocess
    fresh = ImageNetwork(ImageNetworkConfig(**model.config.to_diff_dict() | labels))
    fresh.body.load_state_dict(model.body.state_dict())
    return fresh.train(), preprocess


def with_lora(model: PreTrainedModel, rank: int = 8) -> nn.Module:
    """`model` with low-rank adapters (Hu et al. 2021) on the layers of its body, and a whole head."""
    from peft import LoraConfig, get_peft_model

    body = body_of(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    layers = [f"{prefix}.{name}" for name, m in body.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    heads = [
        name for name, module in model.named_children() if module is not body and any(True for _ in module.parameters())
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=heads, lora_dropout=0.0)
    return get_peft_model(model, config)


def body_of(model: PreTrainedModel) -> nn.Module:
    """All but the head."""
    return getattr(model, model.base_model_prefix)


def pooled(features: Tensor) -> Tensor:
    """Features [N, D] of what a body gives: maps [N, D, H, W] are averaged over their places."""
    return features.mean((2, 3)) if features.ndim == 4 else features


class Classification(nn.Module):
    """What the training loop trains: pixels and labels to the sum of cross entropies and their number.

    pixels: uint8 [B, C, S, S]; labels: int64 [B]. In training, images are varied at random, and mixed.
    mode: frozen keeps the body as it is, the running statistics of its normalisations too; gradual does so for the
    first `head_batches` micro-batches; lora leaves them still and trains adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        augment: Augment,
        mode: Mode = "full",
        head_batches: int = 0,
    ):
        super().__init__()
        self.model, self.preprocess, self.augment, self.mode = model, preprocess, augment, mode
        self.head_batches = head_batches
        # Training batches so far, in a buffer so that a resumed run thaws the body when the other would have.
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        if mode == "frozen":
            body_of(model).requires_grad_(False)
        channels_last(model)

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels
        images = pixels.float()
        if self.training:
            images = normalize(random_views(images, self.augment), self.preprocess)
            if self.augment.mixup:
                images, targets = mixed(images, labels, self.model.config.num_labels, self.augment.mixup)
            self._still_body()
            self.batches_seen += 1
        else:
            images = normalize(images, self.preprocess)
        logits = self.model(pixel_values=channels_last(images)).logits.float()
        smoothing = self.augment.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return loss, torch.tensor(float(len(labels)), device=loss.device)

    @property
    def leaves_parameters_out(self) -> bool:
        """Whether parameters that learn have no gradient in some updates; see `lmkit.training.sharding.prepare`."""
        return self.mode == "gradual"

    def _still_body(self) -> None:
        still = self.mode == "frozen" or (self.mode == "gradual" and self.batches_seen < self.head_batches)
        if self.mode == "gradual":
            body_of(self.model).requires_grad_(not still)
        if still or self.mode == "lora":
            base = self.model.get_base_model() if self.mode == "lora" else self.model
            body_of(base).eval()


@torch.no_grad()
def classify(model: nn.Module, pixels: Tensor, preprocess: Preprocess, batch_size: int = 256) -> Tensor:
    """Logits float32 [N, classes] on the CPU, for uint8 [N, C, S, S]; the model's mode is left as it was."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    found = [
        model(pixel_values=channels_last(normalize(part.to(device), preprocess))).logits.float().cpu()
        for part in pixels.split(batch_size)
    ]
    model.train(was)
    return torch.cat(found)


def channels_last(of):
    """A model or a batch of images in the order in which convolutions in bfloat16 are about twice as fast."""
    return of.to(memory_format=torch.channels_last)
