"""What a diffusion model draws, as pictures and numbers.

Shapes: N images, C channels, S pixels of side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmkit.artifact import write_json
from lmkit.config import validate
from lmkit.data.order import shuffled
from lmkit.errors import BadInput
from lmkit.training.ema import EMA
from lmkit.vision.conditioning import words_of
from lmkit.vision.data import Example
from lmkit.vision.denoiser import Denoiser, draw, drawing
from lmkit.vision.diffusion_options import SamplingOptions, why_not_guided
from lmkit.vision.judge import Judge, distances, judged
from lmkit.vision.pipeline import load_pipeline
from lmkit.vision.plots import grid, headed, save_gif

COLUMNS, ROWS = 10, 8  # of the sheet of samples
Split = tuple[Tensor, list[Example]]


def shown(words: Sequence[str], number: int = COLUMNS) -> list[str]:
    """`number` of the different words, evenly from the first to the last in order; all where there are fewer.

    >>> shown(["b", "a", "b", "c", "d"], 2), shown(["b", "a"], 3), shown(["", ""], 3)
    (['a', 'c'], ['a', 'b'], ['', '', ''])
    """
    different = sorted(set(words))
    if different == [""]:
        return [""] * number
    number = min(number, len(different))
    return [different[i * len(different) // number] for i in range(number)]


def progress(
    denoiser: Denoiser, words: Sequence[str], sampling: SamplingOptions, ema: EMA | None
) -> list[dict[str, Any]]:
    """A row for samples.jsonl: one image after each of `words`, by the plain weights above and the averaged ones below.

    Always of the same noise.
    """
    sheets = [draw(denoiser, words, sampling)]
    if ema is not None:
        with ema.applied():
            sheets.append(draw(denoiser, words, sampling))
    return [{"drawn": _sheet(torch.cat(sheets), words), "after": " | ".join(words)}]


def write_pictures(
    denoiser: Denoiser, words: Sequence[str], sampling: SamplingOptions, seed: int, png: Path, gif: Path | None = None
) -> None:
    """A sheet of `ROWS` images after each of `words`, which stand above them, and how it came out of noise."""
    frames = [_sheet(images, words) for images in drawing(denoiser, [*words] * ROWS, sampling, seed)]
    frames[-1].save(png)
    if gif is not None:
        save_gif(frames, gif)


def sample_directory(
    model: Path,
    words: Sequence[str],
    number: int,
    changes: dict[str, Any],
    seed: int,
    out: Path,
    sheet: Path | None = None,
    gif: Path | None = None,
) -> list[Path]:
    """Draws `number` images after each of `words` with a model directory; the files written, one an image, into `out`.

    changes: what is to be otherwise than the model's own sampling. sheet: one picture of all. gif: how they came out of
    noise. Raises BadInput for words the model cannot be told, for none where it needs some, and for names of files that
    cannot be written.
    """
    for file, suffix in ((sheet, ".png"), (gif, ".gif")):
        if file is not None and (file.suffix.lower() != suffix or not file.parent.is_dir()):
            raise BadInput(f"{file} cannot be written: wanted a name that ends in {suffix}, in a folder that is there.")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; wanted a folder for the images.")
    denoiser, sampling = load_pipeline(model)
    sampling = validate(SamplingOptions, sampling.model_dump() | changes, "the command line")
    if not words and denoiser.conditioner.kind != "none":
        raise BadInput(f"{model} draws after a {denoiser.conditioner.kind}: say what, with --caption.")
    words = [word for word in words or [""] for _ in range(number)]
    *frames, images = drawing(denoiser, words, sampling, seed)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"image-{index:04d}.png" for index in range(len(images))]
    for file, image in zip(files, images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file)
    if sheet is not None:
        grid(images, number).save(sheet)
    if gif is not None:
        save_gif([grid(frame, number) for frame in (*frames, images)], gif)
    return files


def _sheet(images: Tensor, words: Sequence[str]) -> Image.Image:
    sheet = grid(images, len(words))
    return headed(sheet, words) if any(words) else sheet


def write_results(
    folder: Path,
    denoiser: Denoiser,
    sampling: SamplingOptions,
    other_scales: Sequence[float],
    judge: Judge | None,
    splits: dict[str, Split],
    number: int,
    seed: int,
) -> dict[str, float]:
    """Writes samples.png, denoising.gif and metrics.json; the metrics, of each guidance scale under its own name.

    Judged are as many images as the test has, at most `number`, drawn after the captions or classes of the test's; at
    `other_scales` too where the model can be guided.
    """
    kind = denoiser.conditioner.kind
    (train, train_examples), (test, test_examples) = splits["train"], splits["test"]
    words = shown(words_of(train_examples, kind))
    write_pictures(denoiser, words, sampling, seed, folder / "samples.png", folder / "denoising.gif")
    metrics: dict[str, float] = {}
    if judge is not None:
        rows = shuffled(np.arange(min(number, len(test))), len(test), seed).tolist()
        examples, real = [test_examples[row] for row in rows], test[rows]
        labels, train_labels = [e.label for e in examples], [e.label for e in train_examples]
        known = set(train_labels)
        metrics["real/accuracy"] = judged(judge, real, labels, known)["accuracy"]
        scales = [] if why_not_guided(kind, denoiser.drop_condition) else other_scales
        for scale in dict.fromkeys([sampling.guidance_scale, *scales]):
            options = sampling.model_copy(update={"guidance_scale": scale})
            drawn = draw(denoiser, words_of(examples, kind), options, seed)
            found = {} if kind == "none" else judged(judge, drawn, labels, known)
            found |= distances(judge, drawn, real, labels, train, train_labels)
            metrics |= {f"guidance_{scale:g}/{name}": value for name, value in found.items()}
    write_json(folder / "metrics.json", metrics)
    return metrics
