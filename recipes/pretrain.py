"""Pretraining: a language model from nothing, or from an existing one, on token shards.

Reads   --tokenizer and --shards, as the tokenizer stage writes them; --init_from, a model; --embeddings, word vectors
Writes  output_dir/model, a Hugging Face directory with tokenizer and chat template; model_ema where --train.ema_decay

    python recipes/pretrain.py --train.max_steps 1000
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pretrain.py --config my.yaml
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.models.presets import ModelConfig
from lmkit.stage import Stage, run
from lmkit.training import objectives
from lmkit.training.lora import LoraOptions
from lmkit.training.options import TrainConfig


class PretrainConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/pretrain"), "where the stage writes")
    tokenizer: Path = setting(Path("runs/tiny/tokenizer/tokenizer"), "tokenizer directory")
    shards: Path | list[Path] = source(Path("runs/tiny/tokenizer/shards"), "folders of splits train and validation")
    weights: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = setting([], "shares of shards; empty: by size")
    init_from: str | None = source(None, "model to go on training: folder or hub:NAME@REVISION; empty: a fresh one")
    embeddings: Path | None = source(None, "word vectors that a fresh model starts from; empty: none")
    model: ModelConfig = setting(ModelConfig(), "the model, if it is fresh, and the length of its blocks")
    lora: LoraOptions = setting(LoraOptions(), "adapters, merged at the end")
    train: TrainConfig = setting(TrainConfig(), "the training loop")
    objective: objectives.Name = setting("next_token", "what is learnt from a block")
    packing: Literal["stream", "bos_bestfit", "pad"] = setting("pad", "blocks: cut anywhere, whole documents, or one")
    document_mask: bool = setting(False, "no token sees another document of its block")
    z_loss: float = setting(0.0, "weight of the squared log normaliser in a token's loss", ge=0)
    ngram_orders: list[Annotated[int, Field(ge=1, le=32)]] = setting([5, 7], "orders of the n-grams it is held against")
    validation_tokens: int = setting(65_536, "tokens of the validation split that are scored, from its start", gt=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> "PretrainConfig":
        if self.lora.load_in_4bit or (self.lora.r and not self.init_from):
            raise ValueError("lora: adapts the model that init_from names, in full precision")
        if self.init_from and (fresh := self.model.chosen() + ["embeddings"] * bool(self.embeddings)):
            raise ValueError(f"{', '.join(fresh)}: for a fresh model; leave out with init_from")
        objectives.check(self.objective, None if self.init_from else self.model, self.document_mask)
        return self


def main(config: PretrainConfig) -> Path:
    stage = Stage("pretrain", config, large_inputs=("shards",))
    if stage.finished:
        return stage.directory
    import torch
    from peft import get_peft_model

    from lmkit.data.mixture import open_mixture
    from lmkit.data.shards import Shards
    from lmkit.evaluation.baselines import baselines, verdict
    from lmkit.evaluation.held_out import HeldOut
    from lmkit.models.attention import check_documents_apart, packed_attention
    from lmkit.models.presets import build_model
    from lmkit.models.start import load_to_continue
    from lmkit.tokenization.read import load_tokenizer
    from lmkit.training import dial, loop
    from lmkit.training.ema import EMA
    from lmkit.training.lora import merged, peft_config
    from lmkit.training.losses import CausalLMLoss
    from lmkit.training.mfu import flops_per_token

    tokenizer, context_length = load_tokenizer(config.tokenizer), config.model.sizes()["context_length"]
    folders = config.shards if isinstance(config.shards, list) else [config.shards]
    how = {"packing": config.packing, "document_mask": config.document_mask, "weights": config.weights}
    data = open_mixture(folders, "train", tokenizer, context_length, seed=config.seed, **how)
    torch.manual_seed(config.seed)
    start = lambda: load_to_continue(config.init_from, tokenizer, context_length)  # noqa: E731
    model = start() if config.init_from else build_model(config.model, tokenizer, config.embeddings)
    objectives.check(config.objective, model.config, config.document_mask)
    if config.document_mask and config.packing != "pad":
        check_documents_apart(model, "document_ids")
    objective = objectives.Objective(config.objective, model.config, tokenizer, context_length, config.seed)
    validation = Shards.open(folders[0] / "validation"), config.validation_tokens
    held_out = HeldOut.start_of(*validation, tokenizer, context_length, objective)
    adapted = get_peft_model(model, peft_config(config.lora, "CAUSAL_LM", model)) if config.lora.r else model
    accelerator = loop.make_accelerator(config.train.bf16, model.config.hidden_size)
    train = dial.by_depth(config.train, config.model, len(tokenizer), accelerator.num_processes)
    ema = EMA(train.ema_decay) if train.ema_decay else None
    model.to(accelerator.device)

    def save(artifact: str) -> None:
        with stage.seal(artifact) as folder:
            merged(adapted, start).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    with stage:
        stage.say(
            f"pretrain: {model.num_parameters():,} parameters, {data.size()}, vocabulary {len(tokenizer)}, "
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
            f"{accelerator.mixed_precision.replace('no', 'fp32')}"
        )
        options = {"accelerator": accelerator, "stage": stage, "evaluate": lambda: held_out.scores(model)}
        options |= {"ema": ema, "flops_per_token": flops_per_token(model, context_length)}
        options["sample"] = lambda: held_out.continuations(model, config.seed)
        with packed_attention(model):
            metrics = loop.fit(CausalLMLoss(model, config.z_loss), *objective.reading(data), train, **options)
        if accelerator.is_main_process:
            metrics |= held_out.unstrided_scores(model)
            save("model")
            if ema:
                with ema.applied():
                    save("model_ema")
            lines = baselines(data.corpora[0].tokens, held_out.tokens, tokenizer, config.ngram_orders)
            stage.say(f"pretrain: {verdict(metrics, lines)}\nsample: {options['sample']()[0]['completion']}")
            stage.finish(metrics | {f"eval/{key}_bits_per_byte": value for key, value in lines.items()})
        accelerator.wait_for_everyone()
    return stage.directory


if __name__ == "__main__":
    run(main, PretrainConfig, __doc__)
