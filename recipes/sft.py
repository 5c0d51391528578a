"""Supervised fine-tuning: from a pretrained model and demonstrations to a model that answers and stops.

Reads   --model (a pretrained model with its tokenizer), --data (rows with a prompt and a completion)
Writes  output_dir/model (adapters are merged into it), metrics.jsonl, samples.jsonl

    python recipes/sft.py --train.learning_rate 5e-4 --lora.r 16
    accelerate launch recipes/sft.py --config my.yaml
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.stage import Stage, run
from lmkit.training.lora import LoraOptions
from lmkit.training.train_block import check_train_block

DATA, EVAL_DATA = "data/tales/sft.jsonl.gz", "data/tales/sft.validation.jsonl.gz"
TRAIN = {
    "max_steps": 150,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_steps": 50,
}


class SFTStageConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/sft"), "where the stage writes")
    model: Path = source(Path("runs/tiny/pretrain/model"), "pretrained model directory")
    data: str | list[str] = source(DATA, "demonstrations: files, a folder, or hub:NAME@REVISION")
    eval_data: str | list[str] | None = source(EVAL_DATA, "held-out demonstrations; of data of your own: a share")
    eval_fraction: float = setting(0.05, "the share held out when no eval_data is given", gt=0, lt=1)
    mapping: dict[str, str] = setting({}, "columns of the files to prompt and completion, where not recognised")
    on_bad: Literal["error", "skip"] = setting("error", "rows that are none: an error above 1 %, or skipped")
    assistant_only_loss: bool = setting(False, "learn the assistant's earlier turns too, not the last one alone")
    max_length: int = setting(256, "longest row in tokens", gt=0)
    on_truncation: str = setting("error", "longer rows: error above 1 %, drop, or cut", pattern="^(error|drop|cut)$")
    lora: LoraOptions = setting(LoraOptions(), "adapters, under peft's names")
    train: dict[str, Any] = setting(TRAIN, "options of trl.SFTConfig")

    @model_validator(mode="before")
    @classmethod
    def _own_data_is_not_judged_by_tales(cls, values: dict) -> dict:
        own = values.get("data", DATA) != DATA and values.get("eval_data", EVAL_DATA) == EVAL_DATA
        return values | {"eval_data": None} if own else values

    @field_validator("train")
    @classmethod
    def _known(cls, train: dict) -> dict:
        return check_train_block(train, "SFTConfig")


def main(config: SFTStageConfig) -> Path:
    stage = Stage("sft", config)
    if stage.finished:
        return stage.directory
    from trl import SFTConfig, SFTTrainer

    from lmkit.data.encode import encode_demonstrations, short_prompts, show_counts
    from lmkit.data.formats import inspect_rows
    from lmkit.data.sources import hold_out, load_demonstrations
    from lmkit.generation.complete import complete
    from lmkit.models.attention import check_documents_apart
    from lmkit.models.load import check_positions, load_language_model
    from lmkit.tokenization.chat import stop_token_ids
    from lmkit.training.lora import merged, peft_config, quantization
    from lmkit.training.sealed import SealedSFT, arguments, final_evaluation, save_model, train

    class Trainer(SealedSFT, SFTTrainer): ...

    with stage:
        read = lambda path: load_demonstrations(path, config.mapping, config.on_bad) if path else None  # noqa: E731
        rows, eval_rows = read(config.data), read(config.eval_data)
        rows, eval_rows = hold_out(rows, eval_rows, config.eval_fraction, config.seed)
        model, tokenizer = load_language_model(config.model, **quantization(config.lora))
        check_positions(model, config.max_length)
        if config.train.get("packing"):
            check_documents_apart(model, "position_ids")
        how = tokenizer, config.max_length, config.on_truncation, config.assistant_only_loss
        (dataset, counts), (eval_dataset, eval_counts) = (encode_demonstrations(r, *how) for r in (rows, eval_rows))
        counts |= inspect_rows(rows, eval_rows)
        stage.say(show_counts("demonstrations", counts) + "\n" + show_counts("held out", eval_counts))
        prompts, room = short_prompts(eval_rows, tokenizer, config.max_length)

        def sample() -> list[dict]:
            drawn = complete(trainer.model, tokenizer, prompts, max_new_tokens=room, seed=config.seed)
            return [{"prompt": prompt, "completion": one.text} for prompt, one in zip(prompts, drawn)]

        trainer = Trainer(
            stage,
            model=model,
            args=arguments(SFTConfig, config.train, stage, config.max_length if config.train.get("packing") else None),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config(config.lora, "CAUSAL_LM", model),
        )
        train(trainer, sample)
        loss = final_evaluation(trainer)["eval_loss"]
        stage.say(f"sft: held-out loss {loss:.4f} after {trainer.state.global_step} steps")
        model = merged(trainer.model, lambda: load_language_model(config.model, trainer.model.device)[0])
        ids = {"eos_token_id": stop_token_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model.generation_config.update(do_sample=True, **ids)
        save_model(trainer, model)
        stage.finish({"eval_loss": loss, **{f"rows/{name}": count for name, count in counts.items()}})
    return stage.directory


if __name__ == "__main__":
    run(main, SFTStageConfig, __doc__)
