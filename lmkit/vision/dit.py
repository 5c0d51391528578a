"""A diffusion transformer (Peebles and Xie 2022) of the language model's own block.

Squares of the image and tokens of the caption are one sequence in which every place sees every other. The block is
Qwen3's, attention and feed-forward as pretraining has them; what is new is around it: time and class scale, shift and
gate what the block reads and gives (adaLN-Zero), so that at first every block passes its input on unchanged.

Shapes: B images, C channels, S pixels of side, P pixels of a square's, N = (S / P)^2 squares, T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm
from transformers.utils import ModelOutput

from lmkit.errors import BadInput
from lmkit.vision.conditioning import Conditioner
from lmkit.vision.diffusion_options import DiTOptions
from lmkit.vision.options import Preprocess

HEAD = 32  # width of an attention head


class DiTConfig(PreTrainedConfig):
    """text_width: of the caption's states, 0 without captions. num_class_embeds: classes and one for none, or 0."""

    model_type = "lmkit_dit"

    image_size: int = 32
    num_channels: int = 3
    patch_size: int = 2
    hidden_size: int = 128
    num_hidden_layers: int = 4
    text_width: int = 0
    num_class_embeds: int = 0


@dataclass
class DiTOutput(ModelOutput):
    """sample: the prediction [B, C, S, S]."""

    sample: Tensor | None = None


class DiTBlock(nn.Module):
    """The block of the language model between shifts, scales and gates; they start at 0, so the block at x."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer = Qwen3DecoderLayer(config, layer)
        self.modulation = nn.Linear(config.hidden_size, 6 * config.hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, about: Tensor, mask: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T + N, D]; about [B, 1, D]: time and class; mask bool [B, 1, 1, T + N], True where there is a token."""
        layer, (shift, scale, gate, shift_2, scale_2, gate_2) = self.layer, self.modulation(about).chunk(6, -1)
        read = layer.input_layernorm(x) * (1 + scale) + shift
        x = x + gate * layer.self_attn(read, position_embeddings=turned, attention_mask=mask)[0]
        return x + gate_2 * layer.mlp(layer.post_attention_layernorm(x) * (1 + scale_2) + shift_2)


class DiT(PreTrainedModel):
    """x [B, C, S, S] and timesteps [B], with a caption's states or classes, to a prediction [B, C, S, S]."""

    config_class = DiTConfig
    main_input_name = "sample"
    _supports_sdpa = True

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.squares = nn.Conv2d(config.num_channels, width, patch, patch)
        # Fixed, and as loud as a square. Learnt from small ones, places where images look alike become the same place,
        # and then nothing can say what stands left of what.
        self.register_buffer("places", places(config.image_size // patch, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        self.text = nn.Linear(config.text_width, width) if config.text_width else None
        block = Qwen3Config(
            hidden_size=width,
            intermediate_size=3 * width,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD,
            head_dim=HEAD,
            num_hidden_layers=config.num_hidden_layers,
            attn_implementation="sdpa",
        )
        self.blocks = nn.ModuleList(DiTBlock(block, layer) for layer in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.num_channels * patch**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: what the constructor left stands."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> DiTOutput:
        """encoder_hidden_states: [B, T, text_width]; encoder_attention_mask: [B, T], True where there is a token."""
        x = self.squares(sample).flatten(2).transpose(1, 2) + self.places
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if encoder_hidden_states is not None:
            x = torch.cat([self.text(encoder_hidden_states).to(x), x], 1)
            mask = torch.cat([encoder_attention_mask.bool(), mask], 1)
        about = self.time(waves(timestep, self.config.hidden_size).to(x))
        if self.classes is not None:
            about = about + self.classes(class_labels)
        about = F.silu(about)[:, None]
        # Places are added; the block's own rotation by position is left at none: cosine 1, sine 0.
        turned = torch.ones(1, x.shape[1], HEAD).to(x), torch.zeros(1, x.shape[1], HEAD).to(x)
        for block in self.blocks:
            x = block(x, about, mask[:, None, None], turned)
        shift, scale = self.modulation(about).chunk(2, -1)
        x = self.head(self.norm(x[:, -len(self.places) :]) * (1 + scale) + shift)
        side = sample.shape[-1] // self.config.patch_size
        return DiTOutput(F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), self.config.patch_size))


AutoConfig.register(DiTConfig.model_type, DiTConfig)
AutoModel.register(DiTConfig, DiT)


def waves(timesteps: Tensor, width: int, longest: float = 10_000) -> Tensor:
    """Sines and cosines of timesteps [B], wavelengths from 2 pi to 2 pi `longest`: float32 [B, width]."""
    rates = torch.exp(-math.log(longest) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def places(side: int, width: int) -> Tensor:
    """[side^2, width] of the squares of an image, row by row: waves of the row beside waves of the column."""
    row, column = (waves(steps, width // 2, 100) for steps in torch.cartesian_prod(*[torch.arange(side)] * 2).unbind(1))
    return torch.cat([row, column], 1)


def new_dit(options: DiTOptions, preprocess: Preprocess, conditioner: Conditioner) -> DiT:
    """A DiT for those images and conditions. BadInput where squares do not fill the image, or heads the width."""
    if preprocess.size % options.patch_size:
        raise BadInput(
            f"images of {preprocess.size} x {preprocess.size} are not filled by squares of {options.patch_size}. "
            f"Set preprocess.size to a multiple, or change dit.patch_size."
        )
    if options.hidden_size % HEAD:
        raise BadInput(f"dit.hidden_size {options.hidden_size} is no multiple of {HEAD}, the width of a head.")
    return DiT(
        DiTConfig(
            image_size=preprocess.size,
            num_channels=preprocess.channels,
            text_width=conditioner.width if conditioner.kind == "text" else 0,
            num_class_embeds=len(conditioner.names) + 1 if conditioner.kind == "class" else 0,
            **options.model_dump(),
        )
    )
