"""A network that tells image and noise apart, its training loss, and images drawn with it.

Shapes: B or N images, C channels, S pixels of side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmkit.errors import BadInput
from lmkit.vision.classifier import channels_last
from lmkit.vision.conditioning import Batch, Conditioner, without_some
from lmkit.vision.diffusion import add_noise, clean_and_noise, guided, make_schedule, target
from lmkit.vision.diffusion_options import ProcessOptions, SamplingOptions, why_not_guided
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import normalize
from lmkit.vision.samplers import levels, sample

SEEDS = 2**20  # images of one seed of `draw` before the next one's begin


class Denoiser(nn.Module):
    """What the training loop trains: pixels and their condition to the sum of mean squared errors, and B.

    pixels: uint8 [B, C, S, S]; batch: the tensors of the conditioner. In training level and noise of each image are
    drawn at random, and a share `drop_condition` has its condition left out, as guidance needs; in evaluation they are
    the same each time.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        process: ProcessOptions,
        preprocess: Preprocess,
        drop_condition: float = 0.0,
    ):
        super().__init__()
        self.network, self.conditioner = channels_last(network), conditioner
        self.process, self.preprocess, self.drop_condition = process, preprocess, drop_condition
        self.schedule = make_schedule(process.schedule)

    def forward(self, pixels: Tensor, **batch: Tensor) -> tuple[Tensor, Tensor]:
        clean = normalize(pixels, self.preprocess)
        generator = None if self.training else torch.Generator(clean.device).manual_seed(0)
        options = {"device": clean.device, "generator": generator}
        level = torch.randint(len(self.schedule), (len(clean),), **options)
        noise = torch.randn(clean.shape, **options)
        if self.training and self.drop_condition and batch:
            dropped = torch.rand(len(clean), device=clean.device) < self.drop_condition
            batch = without_some(self.conditioner, batch, dropped)
        numbers = (self.schedule.alphas, self.schedule.sigmas)
        alpha, sigma = (values.to(clean.device)[level].float().view(-1, 1, 1, 1) for values in numbers)
        predicted = self.predict(add_noise(clean, noise, alpha, sigma), level, self.conditioner(**batch))
        wanted = target(clean, noise, alpha, sigma, self.process.objective)
        loss = F.mse_loss(predicted, wanted, reduction="sum") / clean[0].numel()
        return loss, torch.tensor(float(len(clean)), device=loss.device)

    def predict(self, x: Tensor, level: Tensor | int, conditions: Batch) -> Tensor:
        """The network's prediction at x [B, C, S, S], float32. conditions: what the conditioner gives."""
        level = torch.as_tensor(level, device=x.device).expand(len(x))
        return self.network(channels_last(x), level + self.schedule.first_timestep, **conditions).sample.float()

    def check_guidance(self, scale: float) -> None:
        """BadInput where there is no prediction without the condition to go away from."""
        if scale != 1 and (why := why_not_guided(self.conditioner.kind, self.drop_condition)):
            raise BadInput(f"guidance_scale is {scale}, but {why}")


def to_pixels(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [N, C, S, S] of what `normalize` made floats of, cut to what a pixel can be."""
    numbers = (preprocess.mean, preprocess.std)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in numbers)
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, pixels: Tensor, words: Sequence[str], batch_size: int = 256) -> float:
    """The mean loss of the evaluation mode on uint8 [N, C, S, S] with their words."""
    assert not denoiser.training
    device, total = next(denoiser.parameters()).device, 0.0
    for start in range(0, len(pixels), batch_size):
        batch = denoiser.conditioner.tensors(words[start : start + batch_size])
        part = {name: tensor.to(device) for name, tensor in batch.items()}
        total += denoiser(pixels[start : start + batch_size].to(device), **part)[0].item()
    return total / len(pixels)


def draw(
    denoiser: Denoiser, words: Sequence[str], sampling: SamplingOptions, seed: int = 0, batch_size: int = 250
) -> Tensor:
    """An image for each of `words` (empty ones without condition), uint8 [N, C, S, S].

    Image n of a seed is the same whatever is drawn beside it and in whatever batches, up to rounding.
    """
    images = []
    for start in range(0, len(words), batch_size):
        *_, last = drawing(denoiser, words[start : start + batch_size], sampling, seed, start)
        images.append(last)
    return torch.cat(images)


@torch.no_grad()
def drawing(
    denoiser: Denoiser, words: Sequence[str], sampling: SamplingOptions, seed: int = 0, first: int = 0
) -> Iterator[Tensor]:
    """Yields the images after each step of the sampler, uint8 [N, C, S, S]; `first`: the number of the first one."""
    denoiser.check_guidance(sampling.guidance_scale)
    schedule, preprocess, conditioner = denoiser.schedule, denoiser.preprocess, denoiser.conditioner
    device, objective = next(denoiser.parameters()).device, denoiser.process.objective
    stops = levels(schedule, sampling.sampler, sampling.num_inference_steps)
    batch = {name: tensor.to(device) for name, tensor in conditioner.tensors(words).items()}
    given, without = conditioner(**batch), conditioner(**conditioner.empty(batch))
    shape = (preprocess.channels, preprocess.size, preprocess.size)
    black_and_white = torch.tensor([0, 255], device=device).view(2, 1, 1, 1).expand(2, preprocess.channels, 1, 1)
    darkest, brightest = normalize(black_and_white, preprocess)
    # One generator an image, on the CPU, so that an image depends on nothing but its seed and number.
    generators = [torch.Generator().manual_seed(seed * SEEDS + first + n) for n in range(len(words))]
    noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # noqa: E731

    def denoise(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        scale = sampling.guidance_scale
        prediction = denoiser.predict(x, level, given if scale else without)
        if scale not in (0, 1):
            prediction = guided(denoiser.predict(x, level, without), prediction, scale)
        alpha, sigma = schedule.at(level)
        clean, found = clean_and_noise(prediction, x, alpha, sigma, objective)
        if objective == "eps":  # divided by an alpha near 0, its errors would throw the image out of all bounds
            clean = clean.clamp(darkest, brightest)
            found = (x - alpha * clean) / sigma
        return clean, found

    for x in sample(denoise, schedule, noise(), stops, sampling.sampler, noise):
        yield to_pixels(x, preprocess)
