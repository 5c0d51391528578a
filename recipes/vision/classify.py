"""Image classification: a network from nothing, or one that goes on from a trained body.

Reads   --data (label folders, a metadata file, IDX, CIFAR batches, Parquet, npz, a saved dataset, builtin:digits)
Writes  output_dir/model (weights, config, preprocess.json), output_dir/results (metrics.json, report.txt,
        confusion.png, mistakes.png), metrics.jsonl

    python recipes/vision/classify.py --data photos --init_from runs/cifar/model --mode frozen
"""

import contextlib
from pathlib import Path
from typing import Literal

from lmkit.config import StageConfig, knob, setting, source
from lmkit.stage import Stage, run
from lmkit.vision.options import DIGITS, Augment, ImageTrainConfig, Preprocess

TRAIN = ImageTrainConfig(
    per_device_train_batch_size=64,
    learning_rate=5e-3,
    lr_scheduler_type="cosine",
    optim="adamw_torch_fused",
    weight_decay=0.05,
)


class ClassifyConfig(StageConfig):
    output_dir: Path = knob(Path("runs/classify"), "where the stage writes")
    data: str = source("builtin:digits", "images with labels")
    label_pattern: str | None = setting(None, "regular expression whose group is the label in a file's name")
    skip_bad: bool = setting(False, "leave damaged images out, and say how many, instead of stopping")
    test_fraction: float = setting(0.2, "share of each class kept for a test where data has none", gt=0, lt=1)
    validation_fraction: float = setting(0.1, "share of train that chooses, where something is chosen", gt=0, lt=1)
    limit: int | None = setting(None, "train on that many images of each class", gt=0)
    network: str = setting("resnet18_narrow", "name in lmkit/vision/cnn.py, hf:DIRECTORY or timm:NAME")
    init_from: Path | None = setting(None, "classifier whose body and preprocessing to go on from")
    mode: Literal["full", "frozen", "gradual", "lora"] = setting("full", "what of that body learns")
    head_fraction: float = setting(0.3, "gradual: share of the updates in which the head learns alone", ge=0, le=1)
    preprocess: Preprocess = setting(DIGITS, "how an image becomes the input of a new network")
    augment: Augment = setting(Augment(shift=0.125), "random changes of training images")
    patience: int | None = setting(None, "evaluations without a better one before stopping; keeps the best", gt=0)
    train: ImageTrainConfig = setting(TRAIN, "the training loop")


def main(config: ClassifyConfig) -> Path:
    stage = Stage("classify", config)
    if stage.finished:
        return stage.directory
    import torch

    from lmkit.training import loop
    from lmkit.training.ema import EMA
    from lmkit.vision.best import Best
    from lmkit.vision.classifier import Classification, classify, new_classifier, with_classes, with_lora
    from lmkit.vision.data import classification_splits
    from lmkit.vision.evaluate import label_ids, scores, write_report
    from lmkit.vision.pixels import load_splits, measured, normalize
    from lmkit.vision.plots import show_in_tensorboard

    fractions = {"test": config.test_fraction, "validation": config.validation_fraction if config.patience else 0.0}
    splits, classes = classification_splits(config.data, config.label_pattern, fractions, config.limit, config.seed)
    torch.manual_seed(config.seed)
    asked = config.preprocess if config.preprocess != DIGITS else None
    old = with_classes(config.init_from, classes, asked) if config.init_from else None
    model, preprocess = old or (None, config.preprocess)
    with stage:
        loaded = load_splits(splits, preprocess, config.skip_bad, stage.say)
        data = {name: (pixels, label_ids(kept, classes)) for name, (pixels, kept) in loaded.items()}
        pixels, labels = data["train"]
        if model is None:
            preprocess = measured(preprocess, pixels)
            model = new_classifier(config.network, preprocess, classes)
        if config.mode == "lora":
            model = with_lora(model)
        accelerator = loop.make_accelerator(config.train.bf16, loop.CPU_BF16_WIDTH)
        train = config.train.in_steps(len(pixels), accelerator.num_processes)
        head_batches = round(config.head_fraction * train.max_steps * train.gradient_accumulation_steps)
        task = Classification(model, preprocess, config.augment, config.mode, head_batches).to(accelerator.device)
        stage.say(
            f"classify: {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes, "
            + ", ".join(f"{len(y):,} {name}" for name, (_, y) in data.items())
            + f", {train.max_steps} updates of {train.per_device_train_batch_size}, mode {config.mode}"
        )
        watched, best = "validation" if "validation" in data else "test", Best(stage.directory / "best")

        def evaluate() -> dict[str, float]:
            with accelerator.autocast():
                found = scores(model, *data[watched], preprocess)
            if config.patience and accelerator.is_main_process:
                best.offer(model, found["accuracy"], int(task.batches_seen))
            return {f"eval/{name}": value for name, value in found.items()}

        def enough() -> bool:
            without_better = (int(task.batches_seen) - best.step) // train.gradient_accumulation_steps
            return bool(config.patience) and without_better >= config.patience * train.eval_steps

        ema = EMA(train.ema_decay) if train.ema_decay else None
        fetch = lambda index: {"pixels": pixels[index], "labels": labels[index]}  # noqa: E731
        options = {"evaluate": evaluate, "enough": enough, "unit": "images", "ema": ema}
        metrics = loop.fit(task, fetch, len(pixels), train, accelerator=accelerator, stage=stage, **options)
        with ema.applied() if ema else contextlib.nullcontext():
            if config.patience:
                best.restore(model)
            model = model.merge_and_unload() if config.mode == "lora" else model
            if accelerator.is_main_process:
                logits = classify(model, data["test"][0], preprocess)
                with stage.seal("results") as folder:
                    found, report = write_report(folder, logits, *data["test"], classes)
                if "tensorboard" in config.report_to:
                    show_in_tensorboard(stage.directory, model, normalize(pixels[:8], preprocess))
                stage.say(f"{report}\nclassify: test accuracy {found['accuracy']:.4f} on {len(logits):,} images")
                with stage.seal("model") as folder:
                    model.save_pretrained(folder)
                    preprocess.save(folder)
                stage.finish(metrics | {f"test/{name}": value for name, value in found.items()})
    return stage.directory


if __name__ == "__main__":
    run(main, ClassifyConfig, __doc__)
