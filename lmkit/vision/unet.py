"""The U-Net (Ronneberger et al. 2015): a small one of diffusers' own classes, which plain diffusers loads.

With captions `UNet2DConditionModel`, whose pixels attend to the states of every token; otherwise `UNet2DModel`.
"""

from __future__ import annotations

from torch import nn

from lmkit.errors import BadInput
from lmkit.vision.conditioning import Conditioner
from lmkit.vision.diffusion_options import UNetOptions
from lmkit.vision.options import Preprocess

GROUPS = 8  # of the group normalisation


def new_unet(options: UNetOptions, preprocess: Preprocess, conditioner: Conditioner) -> nn.Module:
    """A U-Net for those images and conditions: (x [B, C, S, S], timesteps [B], **conditions).sample [B, C, S, S].

    Attention, to the image and to a caption, is at all resolutions but the first, where it would cost the most.
    Raises BadInput for images that cannot be halved so often, or widths that cannot be normalised in groups.
    """
    try:
        from diffusers import UNet2DConditionModel, UNet2DModel
    except ImportError:
        raise BadInput("a U-Net needs diffusers: pip install -e '.[vision]', or set network to dit.") from None

    widths, halvings = options.widths, len(options.widths) - 1
    if preprocess.size % 2**halvings:
        raise BadInput(
            f"images of {preprocess.size} x {preprocess.size} cannot be halved {halvings} times, as unet.widths "
            f"{widths} asks. Set preprocess.size to a multiple of {2**halvings}, or give fewer widths."
        )
    if any(width <= 0 or width % GROUPS or width % options.num_heads for width in widths):
        raise BadInput(f"unet.widths {widths}: wanted multiples of {GROUPS} and of num_heads {options.num_heads}.")
    common = {
        "sample_size": preprocess.size,
        "in_channels": preprocess.channels,
        "out_channels": preprocess.channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": options.num_layers,
        "norm_num_groups": GROUPS,
    }
    if conditioner.kind == "text":
        return UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * halvings),
            up_block_types=(*["CrossAttnUpBlock2D"] * halvings, "UpBlock2D"),
            cross_attention_dim=conditioner.width,
            attention_head_dim=options.num_heads,  # the number of heads, by a slip that diffusers keeps
        )
    return UNet2DModel(
        **common,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * halvings),
        up_block_types=(*["AttnUpBlock2D"] * halvings, "UpBlock2D"),
        attention_head_dim=widths[-1] // options.num_heads,
        num_class_embeds=len(conditioner.names) + 1 if conditioner.kind == "class" else None,
    )
