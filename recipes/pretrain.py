"""Pretraining: a language model from nothing, or from an existing one, on token shards.

Reads   --tokenizer and --shards, as the tokenizer stage writes them
Writes  output_dir/model, a plain Hugging Face directory with tokenizer and chat template; metrics.jsonl

    python recipes/pretrain.py --train.max_steps 1000
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pretrain.py --config my.yaml
"""

from pathlib import Path
from typing import Literal

from lmkit.config import StageConfig, knob, setting
from lmkit.errors import BadInput
from lmkit.models.presets import ModelConfig
from lmkit.stage import Stage, run
from lmkit.training.options import TrainConfig


class PretrainConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/pretrain"), "where the stage writes")
    tokenizer: Path = setting(Path("runs/tiny/tokenizer/tokenizer"), "tokenizer directory")
    shards: Path = setting(Path("runs/tiny/tokenizer/shards"), "token shards with the splits train and validation")
    init_from: Path | None = setting(None, "model directory to go on training from, instead of a fresh `model`")
    model: ModelConfig = setting(ModelConfig(), "the model, if it is fresh")
    train: TrainConfig = setting(TrainConfig(), "the training loop")
    packing: Literal["stream", "pad"] = setting("pad", "blocks: the corpus cut anywhere, or one document each")
    ngram_orders: list[int] = setting([5, 7], "orders of the n-grams that the model is held against")
    validation_tokens: int = setting(65_536, "tokens of the validation split that are scored, from its start", gt=0)


def main(config: PretrainConfig) -> Path:
    stage = Stage("pretrain", config)
    if stage.finished:
        return stage.directory
    import torch

    from lmkit.data.blocks import Blocks
    from lmkit.data.shards import Shards
    from lmkit.evaluation.baselines import baselines, beaten_by
    from lmkit.evaluation.held_out import HeldOut
    from lmkit.models.attention import packed_attention
    from lmkit.models.load import load_language_model
    from lmkit.models.presets import build_model
    from lmkit.tokenization.read import load_tokenizer
    from lmkit.training import loop
    from lmkit.training.losses import CausalLMLoss

    tokenizer = load_tokenizer(config.tokenizer)
    train, validation = Shards.open(config.shards / "train"), Shards.open(config.shards / "validation")
    train.check_tokenizer(tokenizer)
    torch.manual_seed(config.seed)
    if config.init_from is None:
        model = build_model(config.model, tokenizer)
    else:
        model, own = load_language_model(config.init_from)
        train.check_tokenizer(own)
    context_length = config.model.sizes()["context_length"]
    if context_length > model.config.max_position_embeddings:
        raise BadInput(
            f"context_length {context_length} is more than the {model.config.max_position_embeddings} of "
            f"{config.init_from}. Lower model.context_length."
        )
    blocks = Blocks(train, context_length, config.packing)
    accelerator = loop.make_accelerator(config.train.bf16, model.config.hidden_size)
    model.to(accelerator.device)
    held_out = HeldOut.start_of(validation, config.validation_tokens, tokenizer, context_length)

    with stage:
        stage.say(
            f"pretrain: {model.num_parameters():,} parameters, {len(train.tokens):,} tokens in {len(blocks):,} blocks "
            f"of {context_length}, vocabulary {len(tokenizer)}, {accelerator.num_processes} process(es) on "
            f"{accelerator.device.type}, {accelerator.mixed_precision.replace('no', 'fp32')}"
        )
        options = {"accelerator": accelerator, "stage": stage, "evaluate": lambda: held_out.scores(model)}
        options["sample"] = lambda: held_out.continuations(model, config.seed)
        with packed_attention(model):
            metrics = loop.fit(CausalLMLoss(model), blocks.fetch, len(blocks), config.train, **options)
        if accelerator.is_main_process:
            metrics |= held_out.scores(model) | held_out.unstrided_scores(model)
            ours, stride = metrics["eval/bits_per_byte"], metrics["eval/stride"]
            lines = baselines(train.tokens, held_out.tokens, tokenizer, config.ngram_orders)
            stage.say(
                f"pretrain: validation bits per byte {ours:.4f}, perplexity {metrics['eval/perplexity']:.3f} per token "
                f"(context {context_length}, stride {stride}); {metrics['eval/unstrided_bits_per_byte']:.4f} unstrided"
            )
            stage.say("without weights: " + ", ".join(f"{name} {line:.4f}" for name, line in lines.items()))
            if better := beaten_by(ours, lines):
                stage.say(f"warning: the model is worse than {better[0]}; give it more steps or another rate.")
            stage.say(f"sample: {held_out.continuations(model, config.seed)[0]['completion']}")
            with stage.seal("model") as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            stage.finish(metrics | {f"eval/{key}_bits_per_byte": value for key, value in lines.items()})
        accelerator.wait_for_everyone()
    return stage.directory


if __name__ == "__main__":
    run(main, PretrainConfig, __doc__)
