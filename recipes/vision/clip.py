"""Contrastive training of images and captions: a model that names, finds and ranks pictures by words.

Reads   --data (images with captions: a metadata file, Parquet, a saved dataset, builtin:digit_pairs, builtin:digits;
        or with labels, of which --caption makes captions), optionally a language model (--text_model)
Writes  output_dir/model (weights, config, tokenizer, preprocess.json), output_dir/results/metrics.json, metrics.jsonl

    python recipes/vision/clip.py --data photos --text_model runs/tiny/pretrain/model --preprocess.size 64
"""

import contextlib
from pathlib import Path

from pydantic import model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.models.presets import ModelConfig
from lmkit.stage import Stage, run
from lmkit.vision.options import Augment, ImageTrainConfig, Preprocess

TEXT = ModelConfig(preset="nano", num_hidden_layers=3, context_length=64)
TRAIN = ImageTrainConfig(
    num_train_epochs=3,
    per_device_train_batch_size=128,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    optim="adamw_torch_fused",
    weight_decay=0.05,
)


class ClipConfig(StageConfig):
    output_dir: Path = knob(Path("runs/clip"), "where the stage writes")
    data: str = source("builtin:digit_pairs", "images with captions")
    caption: str | None = setting(None, "text with {} for the label, for images that have no caption")
    skip_bad: bool = setting(False, "leave damaged images out, and say how many, instead of stopping")
    test_fraction: float = setting(0.1, "share of train kept for the test where data has no other split", gt=0, lt=1)
    templates: list[str] = setting(["{}"], "texts with {} for a class's name, whose mean is the class (zero-shot)")
    network: str = setting("resnet18_narrow", "image tower: a name in lmkit/vision/cnn.py, or hf:DIRECTORY")
    text_model: Path | None = setting(None, "text tower: a language model with its tokenizer; empty: a new one")
    text: ModelConfig = setting(TEXT, "size of a new text tower")
    vocab_size: int = setting(512, "most ids of a new text tower's tokenizer, which is trained on the captions", gt=0)
    caption_length: int = setting(64, "longest caption in tokens; longer ones are cut", gt=1)
    projection_dim: int = setting(64, "width of the space that images and captions share", gt=0)
    preprocess: Preprocess = setting(Preprocess(size=16, channels=1), "how an image becomes the tower's input")
    augment: Augment = setting(Augment(shift=0.0625), "random changes of training images")
    train: ImageTrainConfig = setting(TRAIN, "the training loop; other pairs are met within a batch alone")

    @model_validator(mode="after")
    def _pairs_are_compared(self):
        if self.train.gradient_accumulation_steps > 1 or self.train.global_batch_size:
            raise ValueError("train: pairs of several micro-batches are never compared. Raise the batch, or processes")
        if self.train.per_device_train_batch_size < 2:
            raise ValueError("train.per_device_train_batch_size: a pair needs another to be told from. Set 2 or more")
        if self.augment.mixup or self.augment.label_smoothing:
            raise ValueError("augment: mixup and label_smoothing are for classes, and captions have none. Leave at 0")
        return self


def main(config: ClipConfig) -> Path:
    stage = Stage("clip", config)
    if stage.finished:
        return stage.directory
    import torch

    from lmkit.artifact import write_json
    from lmkit.training import loop
    from lmkit.training.ema import EMA
    from lmkit.vision.clip import Contrast, caption_ids, image_tower, language_model, pair_towers, save_clip
    from lmkit.vision.match import captioned_splits, match_scores, table
    from lmkit.vision.pixels import load_splits, measured

    splits = captioned_splits(config.data, config.caption, config.test_fraction, config.seed)
    torch.manual_seed(config.seed)
    sizes = {"vocab_size": config.vocab_size, "length": config.caption_length}
    captions = [example.caption for example in splits["train"]]
    language, tokenizer = language_model(config.text_model, config.text, captions, **sizes)
    tower = image_tower(config.network, config.preprocess)
    with stage:
        loaded = load_splits(splits, config.preprocess, config.skip_bad, stage.say)
        (pixels, examples), (test_pixels, test_examples) = loaded["train"], loaded["test"]
        preprocess = measured(config.preprocess, pixels)
        ids, mask, num_cut = caption_ids(tokenizer, [example.caption for example in examples])
        if num_cut:
            stage.say(f"clip: {num_cut} captions cut to {config.caption_length} tokens; raise caption_length for all")
        known = frozenset(example.label for example in examples)
        accelerator = loop.make_accelerator(config.train.bf16, loop.CPU_BF16_WIDTH)
        train = config.train.in_steps(len(pixels), accelerator.num_processes)
        model = pair_towers(tower, language, config.projection_dim)
        task = Contrast(model, preprocess, config.augment).to(accelerator.device)
        stage.say(
            f"clip: {sum(p.numel() for p in model.parameters()):,} parameters, {len(pixels):,} train, "
            f"{len(test_pixels):,} test, {train.max_steps} updates of {train.per_device_train_batch_size}"
        )

        def scores() -> dict[str, float]:
            return match_scores(model, tokenizer, preprocess, test_pixels, test_examples, config.templates, known)

        def evaluate() -> dict[str, float]:
            with accelerator.autocast():
                found = scores() | {"scale": model.logit_scale.exp().item()}
            return {f"eval/{name}": value for name, value in found.items()}

        ema = EMA(train.ema_decay) if train.ema_decay else None
        fetch = lambda rows: {"pixels": pixels[rows], "input_ids": ids[rows], "attention_mask": mask[rows]}  # noqa: E731
        options = {"evaluate": evaluate, "unit": "images", "ema": ema}
        metrics = loop.fit(task, fetch, len(pixels), train, accelerator=accelerator, stage=stage, **options)
        with ema.applied() if ema else contextlib.nullcontext():
            if accelerator.is_main_process:
                found = scores()
                with stage.seal("results") as folder:
                    write_json(folder / "metrics.json", found | {"num_images": len(test_pixels)})
                stage.say(table(found))
                with stage.seal("model") as folder:
                    save_clip(folder, model, tokenizer, preprocess)
                stage.finish(metrics | {f"test/{name}": value for name, value in found.items()})
    return stage.directory


if __name__ == "__main__":
    run(main, ClipConfig, __doc__)
