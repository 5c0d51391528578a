"""Diffusion: a network that draws images from noise, after a caption, a class or nothing.

Reads   --data (images with captions or labels, as classify.py does; builtin:digits, builtin:digit_pairs), optionally
        what reads the captions (--text_model: a language model, or what clip.py wrote) and a classifier that judges
Writes  output_dir/model (a directory in the layout of diffusers), output_dir/results (samples.png, denoising.gif,
        metrics.json), output_dir/samples (a picture an evaluation, averaged weights below plain ones), metrics.jsonl

    python recipes/vision/classify.py && python recipes/vision/diffusion.py --judge runs/classify/model
"""

import contextlib
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.models.presets import ModelConfig
from lmkit.stage import Stage, run
from lmkit.vision.diffusion_options import DiTOptions, ProcessOptions, SamplingOptions, UNetOptions, why_not_guided
from lmkit.vision.options import ImageTrainConfig, Preprocess

PIXELS = Preprocess(size=8, channels=1, mean=[0.5], std=[0.5])
TRAIN = {"max_steps": 1500, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05}
TRAIN |= {"per_device_train_batch_size": 64, "optim": "adamw_torch_fused", "weight_decay": 0.0, "ema_decay": 0.995}
TRAIN |= {"eval_steps": 250, "save_steps": 250}


class DiffusionConfig(StageConfig):
    output_dir: Path = knob(Path("runs/diffusion"), "where the stage writes")
    data: str = source("builtin:digits", "images, with captions or labels for what is drawn after them")
    condition: Literal["text", "class", "none"] = setting("text", "what an image is drawn after")
    caption: str | None = setting(None, "text with {} for the label, for images that have no caption")
    skip_bad: bool = setting(False, "leave damaged images out, and say how many, instead of stopping")
    test_fraction: float = setting(0.1, "share of train kept for the test where data has no other split", gt=0, lt=1)
    preprocess: Preprocess = setting(PIXELS, "how an image becomes the numbers that are noised: -1 to 1")
    process: ProcessOptions = setting(ProcessOptions(), "how images are noised, and what is predicted of it")
    drop_condition: float = setting(0.1, "share of images trained without their condition, for guidance", ge=0, lt=1)
    network: Literal["unet", "dit"] = setting("unet", "what predicts")
    unet: UNetOptions = setting(UNetOptions(), "its sizes, if it is a U-Net")
    dit: DiTOptions = setting(DiTOptions(), "its sizes, if it is a diffusion transformer")
    text_model: Path | None = setting(None, "reader of captions: a language model, or what clip.py wrote; empty: new")
    freeze_text: bool = setting(False, "leave that reader as it is")
    text: ModelConfig = setting(ModelConfig(preset="nano", context_length=64), "size of a new reader")
    vocab_size: int = setting(512, "most ids of a new reader's tokenizer, which is trained on the captions", gt=0)
    caption_length: int = setting(64, "longest caption in tokens", gt=1)
    sampling: SamplingOptions = setting(SamplingOptions(), "how images are drawn")
    other_guidance: list[float] = setting([2.0], "more guidance scales to judge at, where there is a condition")
    judge: Path | None = source(None, "classifier of single images of these, as classify.py writes it")
    num_judged: int = setting(1000, "most images drawn for the judge, after as many of the test", gt=0)
    train: ImageTrainConfig = setting(ImageTrainConfig(**TRAIN), "the training loop")

    @model_validator(mode="after")
    def _parts_fit(self) -> "DiffusionConfig":
        why = why_not_guided(self.condition, self.drop_condition)
        if why and self.sampling.guidance_scale != 1:
            raise ValueError(f"sampling.guidance_scale {self.sampling.guidance_scale}: {why}")
        if self.freeze_text and not self.text_model:
            raise ValueError("freeze_text: a new reader has to learn. Give text_model, or leave it out")
        return self


def main(config: DiffusionConfig) -> Path:
    stage = Stage("diffusion", config)
    if stage.finished:
        return stage.directory
    import torch

    from lmkit.training import loop
    from lmkit.training.ema import EMA
    from lmkit.vision.conditioning import conditioned_splits, new_conditioner, words_of
    from lmkit.vision.denoiser import Denoiser, held_out_loss
    from lmkit.vision.dit import new_dit
    from lmkit.vision.drawn import progress, shown, write_results
    from lmkit.vision.judge import load_judge
    from lmkit.vision.pipeline import save_pipeline
    from lmkit.vision.pixels import load_splits, measured
    from lmkit.vision.unet import new_unet

    splits = conditioned_splits(config.data, config.condition, config.caption, config.test_fraction, config.seed)
    judge = load_judge(config.judge, config.preprocess, [e.label for e in splits["test"]]) if config.judge else None
    torch.manual_seed(config.seed)
    reader = (config.text_model, config.text, config.vocab_size, config.caption_length, config.freeze_text)
    conditioner = new_conditioner(config.condition, words_of(splits["train"], config.condition), *reader)
    make, sizes = (new_unet, config.unet) if config.network == "unet" else (new_dit, config.dit)
    network = make(sizes, config.preprocess, conditioner)
    with stage:
        loaded = load_splits(splits, config.preprocess, config.skip_bad, stage.say)
        words = {name: words_of(examples, config.condition) for name, (_, examples) in loaded.items()}
        pixels, batch = loaded["train"][0], conditioner.tensors(words["train"])
        preprocess = measured(config.preprocess, pixels)
        accelerator = loop.make_accelerator(config.train.bf16, sizes.width)
        train = config.train.in_steps(len(pixels), accelerator.num_processes)
        model = Denoiser(network, conditioner, config.process, preprocess, config.drop_condition)
        model.to(accelerator.device)
        stage.say(
            f"diffusion: {sum(p.numel() for p in model.parameters()):,} parameters, {len(pixels):,} train, "
            f"{len(words['test']):,} test, {train.max_steps} updates of {train.per_device_train_batch_size}"
        )
        ema = EMA(train.ema_decay) if train.ema_decay else None
        fetch = lambda rows: {"pixels": pixels[rows]} | {name: t[rows] for name, t in batch.items()}  # noqa: E731
        options = {"unit": "images", "ema": ema}
        options["evaluate"] = lambda: {"eval/loss": held_out_loss(model, loaded["test"][0], words["test"])}
        options["sample"] = lambda: progress(model, shown(words["train"]), config.sampling, ema)
        metrics = loop.fit(model, fetch, len(pixels), train, accelerator=accelerator, stage=stage, **options)
        if accelerator.is_main_process:
            with ema.applied() if ema else contextlib.nullcontext():
                with stage.seal("results") as folder:
                    how = (config.sampling, config.other_guidance, judge, loaded, config.num_judged, config.seed)
                    found = write_results(folder, model, *how)
                stage.say("\n".join(f"{name}  {value:.4f}" for name, value in found.items()))
                with stage.seal("model") as folder:
                    save_pipeline(folder, model, config.sampling)
            stage.finish(metrics | found)
    return stage.directory


if __name__ == "__main__":
    run(main, DiffusionConfig, __doc__)
