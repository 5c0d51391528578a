"""A generator against a discriminator: drawing images by another way than diffusion, to compare the two.

Reads   --data (images, as classify.py does), optionally a classifier that judges (--judge)
Writes  output_dir/model (the generator), output_dir/results (samples.png, metrics.json), output_dir/samples (a picture
        an evaluation, always of the same noise), metrics.jsonl

    python recipes/vision/classify.py && python recipes/vision/gan.py --judge runs/classify/model
"""

import contextlib
from pathlib import Path
from typing import Any

from pydantic import model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.stage import Stage, run
from lmkit.vision.options import ImageTrainConfig, Preprocess

# Mean and deviation 0.5: pixels from -1 to 1, as the generator's last layer gives them.
PIXELS = Preprocess(size=8, channels=1, mean=[0.5], std=[0.5])
# A memory of gradients makes the two circle around each other.
TRAIN = {"max_steps": 4000, "learning_rate": 1e-3, "lr_scheduler_type": "wsd", "warmup_ratio": 0.01, "adam_beta1": 0.0}
TRAIN |= {"per_device_train_batch_size": 64, "optim": "adamw_torch_fused", "weight_decay": 0.0, "adam_beta2": 0.99}
TRAIN |= {"max_grad_norm": 100.0, "ema_decay": 0.995, "bf16": False, "torch_compile": False}
TRAIN |= {"logging_steps": 100, "eval_steps": 500, "save_steps": 500}


class GanConfig(StageConfig):
    output_dir: Path = knob(Path("runs/gan"), "where the stage writes")
    data: str = source("builtin:digits", "images; labels are for the judge alone")
    skip_bad: bool = setting(False, "leave damaged images out, and say how many, instead of stopping")
    test_fraction: float = setting(0.1, "share of train kept for the test where data has no other split", gt=0, lt=1)
    preprocess: Preprocess = setting(PIXELS, "how an image becomes numbers")
    latent_dim: int = setting(64, "numbers of noise that an image is drawn from", gt=0)
    width: int = setting(256, "of the two hidden layers of either network", gt=0)
    penalty: float = setting(0.1, "weight of the squared slope of the discriminator at real images; 0: none", ge=0)
    judge: Path | None = source(None, "classifier of these images, as classify.py writes it")
    num_judged: int = setting(1000, "most images drawn for the judge, as many as the test has", gt=0)
    train: ImageTrainConfig = setting(ImageTrainConfig(**TRAIN), "the training loop, of both networks at once")

    @model_validator(mode="after")
    def _is_as_the_networks_need(self) -> "GanConfig":
        if {*(self.preprocess.mean or ()), *(self.preprocess.std or ())} != {0.5}:
            raise ValueError(
                "preprocess.mean and std: the generator gives -1 to 1. Set each to 0.5, a number a channel"
            )
        if self.train.torch_compile and self.penalty:
            raise ValueError("train.torch_compile: compiled modules have no slope of a slope. Set penalty 0, or false")
        return self


def main(config: GanConfig) -> Path:
    stage = Stage("gan", config)
    if stage.finished:
        return stage.directory
    import torch

    from lmkit.artifact import write_json
    from lmkit.training import loop
    from lmkit.training.ema import EMA
    from lmkit.vision.conditioning import conditioned_splits
    from lmkit.vision.gan import Adversaries, draw, fooled, new_discriminator, new_generator
    from lmkit.vision.judge import distances, load_judge
    from lmkit.vision.pixels import load_splits
    from lmkit.vision.plots import grid

    splits = conditioned_splits(config.data, "none", None, config.test_fraction, config.seed)
    judge = load_judge(config.judge, config.preprocess, [e.label for e in splits["test"]]) if config.judge else None
    torch.manual_seed(config.seed)
    generator = new_generator(config.preprocess, config.latent_dim, config.width)
    discriminator = new_discriminator(config.preprocess, config.width)
    with stage:
        loaded = load_splits(splits, config.preprocess, config.skip_bad, stage.say)
        (pixels, examples), (test_pixels, test_examples) = loaded["train"], loaded["test"]
        labels, test_labels = [e.label for e in examples], [e.label for e in test_examples][: config.num_judged]
        test_pixels = test_pixels[: config.num_judged]
        accelerator = loop.make_accelerator(config.train.bf16, config.width)
        train = config.train.in_steps(len(pixels), accelerator.num_processes)
        task = Adversaries(generator, discriminator, config.preprocess, config.penalty).to(accelerator.device)
        sizes = [sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)]
        stage.say("gan: {:,} parameters against {:,}, {:,} images".format(*sizes, len(pixels)))

        def evaluate() -> dict[str, float]:
            return {f"eval/{name}": share for name, share in fooled(task, test_pixels).items()}

        def sample() -> list[dict[str, Any]]:
            with ema.applied() if ema else contextlib.nullcontext():
                return [{"drawn": grid(draw(generator, 40), 10)}]

        ema = EMA(train.ema_decay) if train.ema_decay else None
        fetch = lambda rows: {"pixels": pixels[rows]}  # noqa: E731
        options = {"evaluate": evaluate, "sample": sample, "unit": "images", "ema": ema}
        metrics = loop.fit(task, fetch, len(pixels), train, accelerator=accelerator, stage=stage, **options)
        if accelerator.is_main_process:
            with ema.applied() if ema else contextlib.nullcontext(), stage.seal("model") as folder:
                generator.save_pretrained(folder)
                config.preprocess.save(folder)
                drawn = draw(generator, len(test_pixels), config.seed)
            found = {}
            if judge is not None:
                found = distances(judge, drawn, test_pixels, test_labels, pixels, labels)
                stage.say("\n".join(f"{name}  {value:.4f}" for name, value in found.items()))
            with stage.seal("results") as folder:
                grid(drawn[:80], 10).save(folder / "samples.png")
                write_json(folder / "metrics.json", found)
            stage.finish(metrics | found)
    return stage.directory


if __name__ == "__main__":
    run(main, GanConfig, __doc__)
