"""Reward model: from pairs of completions to a model that scores one, trained from the SFT model.

Reads   --model (the SFT model), --data (what the preferences stage wrote)
Writes  output_dir/model: a sequence-classification model with one label, centred (see lmkit.models.heads.token_scores);
        an ensemble of k also has output_dir/members/1/model to members/k-1/model, each a stage with a seed of its own.

    python recipes/reward.py --train.learning_rate 2e-4 --num_members 3
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.stage import Stage, run
from lmkit.training.lora import LoraOptions
from lmkit.training.train_block import check_train_block

TRAIN = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-3,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "center_rewards_coefficient": 0.01,
    "gradient_checkpointing": False,
    "logging_steps": 20,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 100,
}


class RewardStageConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/reward"), "where the stage writes")
    model: Path = source(Path("runs/tiny/sft/model"), "model to start from; its head is new and starts at zero")
    data: Path = source(Path("runs/tiny/preferences/data"), "pairs: train and heldout, as the preferences stage writes")
    max_length: int = setting(256, "longest prompt with completion in tokens", gt=0)
    on_truncation: str = setting("error", "pairs over max_length: error above 1 %, or drop", pattern="^(error|drop)$")
    margin: str | None = setting(None, "column of the pairs by which the chosen score should be higher; empty: none")
    center_on: Literal["pairs", "samples"] = setting("pairs", "mean score 0 on the pairs, or on samples of --model")
    num_members: int = setting(1, "reward models to train, alike but for their seed", gt=0)
    learn_from: Literal["train", "heldout"] = setting("train", "the pairs to learn from; it is judged on the others")
    judge_dir: Path | None = knob(None, "where to train another one, first, on the pairs this one is judged on")
    lora: LoraOptions = setting(LoraOptions(), "adapters, under peft's names")
    muon: bool = setting(True, "matrices by Muon, as in pretraining; adapters, and DeepSpeed, take train.optim")
    train: dict[str, Any] = setting(TRAIN, "options of trl.RewardConfig")

    @field_validator("train")
    @classmethod
    def _known(cls, train: dict, others: ValidationInfo) -> dict:
        return check_train_block(train, "RewardConfig", others.data.get("muon") and not others.data["lora"].r)


def main(config: RewardStageConfig) -> Path:
    alone = {"judge_dir": None, "num_members": 1}
    if config.judge_dir is not None:  # a judge that PPO never climbs, for data without gold
        main(config.model_copy(update=alone | {"learn_from": "heldout", "output_dir": config.judge_dir}))
    members = []
    for number in range(1, config.num_members):  # seeds far apart, so that runs of seeds 0, 1, 2 share no member
        own = {"output_dir": config.output_dir / f"members/{number}", "seed": config.seed + 1000 * number}
        members.append(main(config.model_copy(update=alone | own)))
    stage = Stage("reward", config)
    if stage.finished:
        return stage.directory
    from datasets import load_from_disk
    from trl import RewardConfig, RewardTrainer

    from lmkit.data.encode import encode_pairs, show_counts
    from lmkit.data.formats import inspect_rows
    from lmkit.evaluation import reward_model as rm
    from lmkit.models.attention import faster_attention
    from lmkit.models.load import check_positions, load_reward_model
    from lmkit.training.lora import merged, peft_config, quantization
    from lmkit.training.sealed import SealedCheckpoints, arguments, save_model, train

    class Trainer(SealedCheckpoints, RewardTrainer): ...

    with stage:
        model, tokenizer = load_reward_model(config.model, **quantization(config.lora))
        check_positions(model, config.max_length)
        pairs = load_from_disk(str(config.data))
        learnt, judged = pairs[config.learn_from], pairs[{"train": "heldout", "heldout": "train"}[config.learn_from]]
        limits = config.max_length, config.on_truncation, config.margin
        (dataset, counts), (heldout, heldout_counts) = (encode_pairs(p, tokenizer, *limits) for p in (learnt, judged))
        counts |= inspect_rows(learnt, judged)
        stage.say(show_counts("pairs", counts) + "\n" + show_counts("held out", heldout_counts))
        trainer = Trainer(
            stage,
            muon=config.muon and not config.lora.r,
            model=model,
            args=arguments(RewardConfig, config.train, stage, width=model.config.hidden_size),
            train_dataset=dataset,
            eval_dataset=heldout,
            processing_class=tokenizer,
            peft_config=peft_config(config.lora, "SEQ_CLS", model),
        )
        with faster_attention(trainer.accelerator, trainer.model):
            train(trainer)
        model = merged(trainer.model, lambda: load_reward_model(config.model, trainer.model.device)[0])
        asked = config.model, learnt["prompt"], config.max_length, config.seed, model.device
        rm.centre(model, rm.completions_of(dataset) if config.center_on == "pairs" else rm.samples_of(*asked))
        scores = rm.pair_scores(model, heldout)
        metrics, bins = rm.judge(scores, heldout, judged)
        others = [rm.pair_scores(load_reward_model(member / "model", model.device)[0], heldout) for member in members]
        metrics |= rm.judge_ensemble([scores, *others])
        stage.say(rm.summary(metrics))
        save_model(trainer, model)
        metrics |= {f"pairs/{name}": value for name, value in counts.items()}
        stage.finish(metrics | {"calibration": bins, "most_wrong": rm.most_wrong(scores, heldout, judged)})
    return stage.directory


if __name__ == "__main__":
    run(main, RewardStageConfig, __doc__)
