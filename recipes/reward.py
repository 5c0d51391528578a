"""Reward model: from pairs of completions to a model that scores one, trained from the SFT model.

Reads   --model (the SFT model), --data (what the preferences stage wrote)
Writes  output_dir/model: a sequence-classification model with one label, centred (see lmkit.models.heads.token_scores)

    python recipes/reward.py --train.learning_rate 2e-4
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.stage import Stage, run
from lmkit.training.train_block import check_train_block

USEFUL_ACCURACY = 0.65
TRAIN = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
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
    learn_from: Literal["train", "heldout"] = setting("train", "the pairs to learn from; it is judged on the others")
    judge_dir: Path | None = knob(None, "where to train another one, first, on the pairs this one is judged on")
    train: dict[str, Any] = setting(TRAIN, "options of trl.RewardConfig")

    @field_validator("train")
    @classmethod
    def _known(cls, train: dict) -> dict:
        return check_train_block(train, "RewardConfig")


def main(config: RewardStageConfig) -> Path:
    if config.judge_dir is not None:  # a judge that PPO never climbs, for data without gold
        other = {"learn_from": "heldout", "output_dir": config.judge_dir, "judge_dir": None}
        main(config.model_copy(update=other))
    stage = Stage("reward", config)
    if stage.finished:
        return stage.directory
    from datasets import load_from_disk
    from trl import RewardConfig, RewardTrainer

    from lmkit.data.encode import encode_pairs, show_counts
    from lmkit.data.formats import inspect_rows
    from lmkit.evaluation.preference import wins
    from lmkit.evaluation.reward_model import centre, judge
    from lmkit.models.load import check_positions, load_reward_model
    from lmkit.training.sealed import SealedCheckpoints, arguments, save_model, train

    class Trainer(SealedCheckpoints, RewardTrainer):
        pass

    with stage:
        model, tokenizer = load_reward_model(config.model)
        check_positions(model, config.max_length)
        pairs = load_from_disk(str(config.data))
        learnt, judged = pairs["train"], pairs["heldout"]
        if config.learn_from == "heldout":
            learnt, judged = judged, learnt
        dataset, counts = encode_pairs(learnt, tokenizer, config.max_length, config.on_truncation)
        heldout, heldout_counts = encode_pairs(judged, tokenizer, config.max_length, config.on_truncation)
        stage.say(show_counts("pairs", inspect_rows(learnt, judged)))
        stage.say(show_counts("for training", counts))
        stage.say(show_counts("held out", heldout_counts))

        trainer = Trainer(
            stage,
            model=model,
            args=arguments(RewardConfig, config.train, stage),
            train_dataset=dataset,
            eval_dataset=heldout,
            processing_class=tokenizer,
        )
        train(trainer)
        centre(model, dataset)
        metrics, bins = judge(model, heldout)
        if "score_chosen" in judged.column_names:  # how often the labeler itself agrees with its noisy labels
            metrics["ceiling"] = float(wins(judged["score_chosen"], judged["score_rejected"]).mean())
        metrics |= {f"pairs/{name}": value for name, value in counts.items()}
        stage.say(
            f"reward: held-out accuracy {metrics['accuracy']:.3f} "
            f"[{metrics['accuracy_low']:.3f}, {metrics['accuracy_high']:.3f}]"
            + (f", annotators' ceiling {metrics['ceiling']:.3f}" if "ceiling" in metrics else "")
            + f", calibration error {metrics['calibration_error']:.3f}"
            + f", correlation with length {metrics['length_correlation']:.2f}"
        )
        if metrics["accuracy"] < USEFUL_ACCURACY:
            stage.say(
                f"warning: accuracy below {USEFUL_ACCURACY:.0%}: PPO on this reward model will not help. Give more "
                "pairs, or pairs whose completions differ more clearly."
            )
        save_model(trainer)
        stage.finish(metrics | {"calibration": bins})
    return stage.directory


if __name__ == "__main__":
    run(main, RewardStageConfig, __doc__)
