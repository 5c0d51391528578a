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
    ngram_order: int = setting(5, "order of the n-gram that the model is held against", ge=1)
    validation_tokens: int = setting(65_536, "tokens of the validation split that are scored, from its start", gt=0)


def main(config: PretrainConfig) -> Path:
    stage = Stage("pretrain", config)
    if stage.finished:
        return stage.directory
    import torch
    from transformers import AutoTokenizer

    from lmkit.data.blocks import Blocks
    from lmkit.data.shards import Shards
    from lmkit.evaluation.bits_per_byte import bits_per_byte, ngram_bits_per_byte, token_bytes
    from lmkit.generation.sampler import sample
    from lmkit.models.attention import packed_attention
    from lmkit.models.load import load_language_model
    from lmkit.models.presets import build_model
    from lmkit.tokenization.chat import stop_token_ids
    from lmkit.training import loop
    from lmkit.training.losses import CausalLMLoss

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)
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
    documents = validation.first_documents(config.validation_tokens)
    scored, sizes = validation.tokens[: documents[-1]], token_bytes(tokenizer)

    def evaluate() -> dict[str, float]:
        options = {"stride": context_length // 2, "batch_size": 32, "document_offsets": documents}
        result = bits_per_byte(model, scored, sizes, context_length, **options)
        return {f"eval/{key}": result[key] for key in ("bits_per_byte", "nats_per_token")}

    with stage:
        stage.say(
            f"pretrain: {model.num_parameters():,} parameters, {len(train.tokens):,} tokens in {len(blocks):,} blocks "
            f"of {context_length}, vocabulary {len(tokenizer)}, {accelerator.num_processes} process(es) on "
            f"{accelerator.device.type}, {accelerator.mixed_precision.replace('no', 'fp32')}"
        )
        options = {"accelerator": accelerator, "stage": stage, "evaluate": evaluate}
        with packed_attention(model):
            metrics = loop.fit(CausalLMLoss(model), blocks.fetch, len(blocks), config.train, **options)
        if accelerator.is_main_process:
            lines = ngram_bits_per_byte(train.tokens, scored, sizes, config.ngram_order)
            ours, theirs = metrics["eval/bits_per_byte"], lines["kneser_ney"]
            stage.say(
                f"pretrain: validation bits per byte {ours:.4f}; {config.ngram_order}-gram Kneser-Ney {theirs:.4f}, "
                f"unigram {lines['unigram']:.4f}, uniform {lines['uniform']:.4f}"
            )
            if ours > theirs:
                stage.say("warning: the model is worse than the n-gram; give it more steps or a higher learning rate.")
            generator = torch.Generator().manual_seed(config.seed)
            stops, room = stop_token_ids(tokenizer), context_length - 1
            drawn = sample(model, [[stops[-1]]], max_new_tokens=room, stop_token_ids=stops, generator=generator)
            stage.say(f"sample: {tokenizer.decode(drawn.ids(0), skip_special_tokens=True)}")
            with stage.seal("model") as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            stage.finish(metrics | {f"eval/{key}_bits_per_byte": value for key, value in lines.items()})
        accelerator.wait_for_everyone()
    return stage.directory


if __name__ == "__main__":
    run(main, PretrainConfig, __doc__)
