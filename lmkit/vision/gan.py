"""Two networks against each other: one draws images from noise, one tells them from real ones.

Goodfellow et al. 2014, Generative adversarial networks (arXiv:1406.2661), with its non-saturating loss, and the penalty
of Mescheder et al. 2018 (arXiv:1801.04406), without which the two circle around each other and never arrive.

Shapes: N images, C channels, S pixels of side, Z numbers of noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import normalize


class GeneratorConfig(PreTrainedConfig):
    """num_channels, image_size: of the images. latent_dim: numbers of noise. width: of the hidden layers."""

    model_type = "lmkit_generator"

    num_channels: int = 1
    image_size: int = 8
    latent_dim: int = 64
    width: int = 256


class Generator(PreTrainedModel):
    """Noise [N, Z] to images [N, C, S, S] from -1 to 1, by a multilayer perceptron as in the first of these."""

    config_class = GeneratorConfig
    main_input_name = "noise"

    def __init__(self, config: GeneratorConfig):
        super().__init__(config)
        shape = (config.num_channels, config.image_size, config.image_size)
        layers = _perceptron(config.latent_dim, config.width, math.prod(shape))
        self.layers = nn.Sequential(*layers, nn.Tanh(), nn.Unflatten(1, shape))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation stands."""

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


AutoConfig.register(GeneratorConfig.model_type, GeneratorConfig)
AutoModel.register(GeneratorConfig, Generator)


def new_generator(preprocess: Preprocess, latent_dim: int, width: int) -> Generator:
    """A generator of images preprocessed so."""
    sizes = {"num_channels": preprocess.channels, "image_size": preprocess.size}
    return Generator(GeneratorConfig(**sizes, latent_dim=latent_dim, width=width))


def new_discriminator(preprocess: Preprocess, width: int) -> nn.Sequential:
    """Images [N, C, S, S] to logits [N, 1], above 0 for real."""
    return nn.Sequential(nn.Flatten(), *_perceptron(preprocess.channels * preprocess.size**2, width, 1))


def _perceptron(inputs, width, outputs):
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return [*hidden, nn.Linear(width, outputs)]


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """-log s(real) - log(1 - s(drawn)) of logits [N], summed; s is the sigmoid.

    >>> round(discriminator_loss(torch.zeros(1), torch.zeros(1)).item(), 4)  # 2 ln 2: it cannot tell
    1.3863
    """
    return F.softplus(-real).sum() + F.softplus(drawn).sum()


def generator_loss(drawn: Tensor) -> Tensor:
    """-log s(drawn) of logits [N], summed: non-saturating, its slope is steepest where the images are worst.

    >>> drawn = torch.tensor([-4.0], requires_grad=True)
    >>> generator_loss(drawn).backward()
    >>> round(drawn.grad.item(), 3)  # log(1 - s(drawn)), which it stands for, has -0.018
    -0.982
    """
    return F.softplus(-drawn).sum()


class Adversaries(nn.Module):
    """What the training loop trains: pixels to the sum of both losses and the number of images.

    Each loss moves its own network alone, and both move at once, by the same update: an adaptive optimizer keeps every
    parameter's moments apart, so one serves two networks.

    pixels: uint8 [N, C, S, S]. penalty: half of it times the squared slope of the logits at real images is added.
    """

    def __init__(self, generator: Generator, discriminator: nn.Module, preprocess: Preprocess, penalty: float):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.preprocess, self.penalty = preprocess, penalty

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        real = normalize(pixels, self.preprocess).requires_grad_()
        drawn = self.generator(torch.randn(len(real), self.generator.config.latent_dim).to(real))
        for_real = self.discriminator(real)
        loss = discriminator_loss(for_real, self.discriminator(drawn.detach()))
        if self.penalty:
            (slope,) = torch.autograd.grad(for_real.sum(), real, create_graph=True)
            loss = loss + self.penalty / 2 * slope.square().sum()
        judge = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        loss = loss + generator_loss(functional_call(self.discriminator, judge, (drawn,)))
        return loss, torch.tensor(float(len(pixels)), device=loss.device)


@torch.no_grad()
def draw(generator: Generator, number: int, seed: int = 0, batch_size: int = 512) -> Tensor:
    """uint8 [number, C, S, S] on the CPU, of noise that `seed` alone decides."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, generator.config.latent_dim, generator=random).to(generator.device)
    drawn = torch.cat([generator(part).float().cpu() for part in noise.split(batch_size)])
    return ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def fooled(adversaries: Adversaries, pixels: Tensor, seed: int = 0) -> dict[str, float]:
    """Shares of real images [N, C, S, S] and of as many drawn ones that the discriminator takes for real."""
    shares, device = {}, adversaries.generator.device
    for name, images in (("real", pixels), ("drawn", draw(adversaries.generator, len(pixels), seed))):
        logits = adversaries.discriminator(normalize(images.to(device), adversaries.preprocess))
        shares[f"{name}_taken_for_real"] = (logits > 0).double().mean().item()
    return shares
