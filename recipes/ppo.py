"""PPO: the SFT model learns to please the reward model without leaving its own neighbourhood.

Reads   --model (the SFT model), --reward (a reward model's directory, or module:function), --prompts, --eval_prompts
Writes  output_dir/model (the policy), output_dir/value (the critic), metrics.jsonl, samples.jsonl

    python recipes/ppo.py --reward my_rewards:politeness --prompts prompts.jsonl
    python recipes/ppo.py --train.kl_coef 0.1 --lora.r 16                    # adapters, one frozen base in memory
"""

from pathlib import Path

from pydantic import field_validator

from lmkit.config import StageConfig, knob, setting, source
from lmkit.rl.config import PPOConfig
from lmkit.stage import Stage, is_main, run
from lmkit.training.lora import LoraOptions, peft_config

TRAIN = PPOConfig(
    total_episodes=60 * 64,
    rollout_batch_size=64,
    num_ppo_epochs=2,
    num_mini_batches=2,
    per_device_train_batch_size=32,
    learning_rate=6e-4,
    value_learning_rate=3e-3,
    bf16=False,  # at this size float32 is as fast on a CPU, and the first mini-batch's ratio is 1 to the fifth digit
    max_new_tokens=128,
    temperature=1.0,
    missing_eos_penalty=1.0,
    kl_coef=0.03,
    guard_max_kl=100.0,
    guard_min_eos_rate=0.2,
    guard_min_entropy=0.02,
)


class PPOStageConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/ppo"), "where the stage writes")
    model: Path = source(Path("runs/tiny/sft/model"), "model to start from, and the reference of the KL penalty")
    reward: str | list[str] = source("runs/tiny/reward/model", "reward model's directory, module:function, or several")
    prompts: str | list[str] = source("data/tales/prompts.train.jsonl.gz", "prompts to learn on")
    eval_prompts: str | list[str] | None = source("data/tales/prompts.heldout.jsonl.gz", "held-out prompts, or none")
    num_eval_prompts: int = setting(64, "how many of them at each evaluation, from the first", gt=0)
    ptx: str | None = source(None, "for train.ptx_coef: a folder of token shards, or files of prompt and completion")
    lora: LoraOptions = setting(LoraOptions(), "adapters on a frozen model that is the reference as well")
    train: PPOConfig = setting(TRAIN, "options of PPO")

    @field_validator("lora")
    @classmethod
    def _in_full_precision(cls, lora: LoraOptions) -> LoraOptions:
        if lora.load_in_4bit:
            raise ValueError("load_in_4bit is not for PPO: its base also is the reference, in full precision")
        return lora


def main(config: PPOStageConfig) -> Path:
    stage = Stage("ppo", config)
    if stage.finished:
        return stage.directory
    from lmkit.data.encode import inspect_prompts, show_counts
    from lmkit.data.sources import load_prompts
    from lmkit.evaluation.preference import component_means, gold_scores
    from lmkit.models.load import load_language_model
    from lmkit.rl.ptx import load_text
    from lmkit.rl.trainer import PPOTrainer

    def gold(rows: list[dict], completions: list[str]) -> dict[str, float]:
        """Held-out gold score and its components where the prompts are of tales: watched, never learnt from."""
        golds = gold_scores([row["prompt"] for row in rows], completions)
        if golds is None:
            return {}
        return {name if name == "gold" else f"gold_{name}": mean for name, mean in component_means(golds).items()}

    with stage:
        model, tokenizer = load_language_model(config.model)
        prompts, heldout = (load_prompts(path) if path else None for path in (config.prompts, config.eval_prompts))
        counts = inspect_prompts(prompts, heldout, tokenizer)
        trainer = PPOTrainer(
            model,
            reward=config.reward,
            args=config.train,
            train_dataset=prompts,
            eval_dataset=heldout and heldout.select(range(min(config.num_eval_prompts, len(heldout)))),
            processing_class=tokenizer,
            peft_config=peft_config(config.lora, "CAUSAL_LM", model),
            ptx_dataset=load_text(config.ptx, model, tokenizer) if config.ptx else None,
            output_dir=stage.directory,
            evaluation=gold,
            seed=config.seed,
            report_to=config.report_to,
            stop_requested=stage.stop_requested,
            say=stage.say,
        )
        train = config.train
        stage.say(
            f"{show_counts('prompts', counts)}\n{train.num_iterations} iterations of {train.rollout_batch_size} "
            f"completions and {train.num_ppo_epochs} x {train.num_mini_batches} updates, "
            f"{'no' if train.advantage_estimator == 'rloo' else train.critic} critic"
        )
        metrics = trainer.train(resume_from_checkpoint=True)
        stage.say(
            f"ppo: score {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.2f} nats, "
            f"{metrics['rollout/completion_length_mean']:.0f} tokens, {metrics['rollout/eos_rate']:.0%} ended; "
            f"first mini-batch's log ratio at most {metrics['val/first_ratio_error']:.1e}"
        )
        for row in trainer.samples[:1]:
            stage.say(f"sample: {row['prompt']} -> {row['completion']} (score {row['score']:.2f})")
        if is_main():
            with stage.seal("model") as folder:
                trainer.save_model(folder)
            if train.advantage_estimator == "gae":
                with stage.seal("value") as folder:
                    trainer.save_value_model(folder)
        stage.finish(metrics | {f"rows/{name}": count for name, count in counts.items()})
    return stage.directory


if __name__ == "__main__":
    run(main, PPOStageConfig, __doc__)
