"""Evaluation: base, SFT, best-of-n and PPO on held-out prompts, one sample each, judged side by side.

Reads   the models of a chain, its reward model, token shards, held-out prompts
Writes  output_dir/results: metrics.json and samples.jsonl (the same prompts side by side)

On prompts of tales the judge is the gold score. Without gold it is --judge, a reward model that PPO never saw, if there
is one; the reward model that PPO climbed is always shown and is no judge of PPO.

    python recipes/evaluation.py --num_prompts 192 --best_of 16
"""

from pathlib import Path

from lmkit import processes
from lmkit.config import StageConfig, knob, setting, source
from lmkit.errors import Interrupted
from lmkit.stage import Stage, is_main, run

MAX_CONTEXT = 2048


class EvaluationConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/evaluation"), "where the stage writes")
    base: Path = source(Path("runs/tiny/pretrain/model"), "pretrained model")
    sft: Path = source(Path("runs/tiny/sft/model"), "SFT model; KL is measured against it")
    ppo: Path = source(Path("runs/tiny/ppo/model"), "model after PPO")
    reward: Path = source(Path("runs/tiny/reward/model"), "reward model: picks the best of n")
    judge: Path | None = source(None, "another reward model, trained on other pairs, as a judge where there is no gold")
    shards: Path = source(Path("runs/tiny/tokenizer/shards"), "token shards, for bits per byte")
    prompts: str | list[str] = source("data/tales/prompts.heldout.jsonl.gz", "held-out prompts")
    num_prompts: int | None = setting(None, "how many of them, from the first; empty: all", gt=0)
    best_of: int = setting(8, "samples of the SFT model of which the reward model takes the best", gt=1)
    max_new_tokens: int = setting(128, "longest completion in tokens", gt=0)
    batch_size: int = knob(256, "completions sampled at a time", gt=0)


def main(config: EvaluationConfig) -> Path:
    stage = Stage("evaluation", config)
    if stage.finished:
        return stage.directory
    from lmkit.artifact import write_json
    from lmkit.data.shards import Shards
    from lmkit.data.sources import load_prompts
    from lmkit.evaluation import compare
    from lmkit.evaluation.bits_per_byte import bits_per_byte
    from lmkit.evaluation.preference import best_of_kl, share
    from lmkit.models.load import load_language_model, load_reward_model
    from lmkit.tracking import append

    with stage:
        state = processes.join()
        loaded = {name: load_language_model(getattr(config, name), state.device) for name in ("base", "sft", "ppo")}
        paths = {"reward": config.reward, "judge": config.judge}
        scorers = {name: load_reward_model(path, state.device) for name, path in paths.items() if path}
        reward_model, judge_model, tokenizer = scorers["reward"][0], scorers.get("judge", [None])[0], loaded["sft"][1]
        compare.check_same_tokenizer({name: pair[1] for name, pair in (loaded | scorers).items()})
        models = {name: model for name, (model, _) in loaded.items()}
        prompts = load_prompts(config.prompts)["prompt"][: config.num_prompts]
        answers, many = sample_all(config, stage, state, models, tokenizer, prompts)
        many_scores = compare.model_scores(reward_model, many).reshape(len(prompts), -1)
        answers[f"best_of_{config.best_of}"] = compare.pick_best(many, many_scores)
        metrics = {"num_prompts": len(prompts), **compare.shape_metrics(answers)}
        scores = {name: compare.model_scores(reward_model, row) for name, row in answers.items()}
        columns = {"score": scores, "length": compare.lengths(answers)}
        if judged := compare.judge(prompts, answers, many, judge_model):
            name, values, many_values = judged
            columns[name] = values
            metrics |= compare.win_rates("win_rate", values, "sft") | compare.best_of_metrics(many_scores, many_values)
            metrics |= compare.gold_components(prompts, answers) if name == "gold" else {}
        metrics["judge"] = judged[0] if judged else "none"
        for column, by_model in columns.items():
            for name, row in by_model.items():
                metrics |= share(f"{column}/{name}", row)
        metrics |= compare.win_rates("win_rate_by_score", scores, "sft")
        metrics |= compare.win_rates("win_rate_by_length", columns["length"], "sft")
        metrics |= share("kl/ppo", compare.sequence_kl(models["ppo"], models["sft"], answers["ppo"]))
        metrics[f"kl/best_of_{config.best_of}"] = best_of_kl(config.best_of)
        validation = Shards.open(config.shards / "validation")
        documents = {"batch_size": 32, "document_offsets": validation.document_offsets}
        for name, model in models.items():
            context = min(getattr(model.config, "max_position_embeddings", MAX_CONTEXT), MAX_CONTEXT)
            measured = bits_per_byte(model, validation.tokens, tokenizer, context, **documents)
            metrics[f"bits_per_byte/{name}"] = measured["bits_per_byte"]
        stage.say("\n".join(compare.table(metrics, list(answers))))
        rows = compare.side_by_side(prompts, answers, columns)
        stage.say(f"sample: {rows[0]['prompt']}\n  sft: {rows[0]['sft']}\n  ppo: {rows[0]['ppo']}")
        if is_main():
            with stage.seal("results") as folder:
                write_json(folder / "metrics.json", metrics)
                append(folder / "samples.jsonl", rows)
        stage.finish(metrics)
    return stage.directory


def sample_all(config: EvaluationConfig, stage: Stage, state, models: dict, tokenizer, prompts: list):
    """({model: one completion for each prompt}, best_of completions of the SFT model for each, side by side)."""
    from lmkit.generation.complete import complete_shared
    from lmkit.tracking import Tracker

    jobs = {name: (model, prompts) for name, model in models.items()}
    jobs["many"] = (models["sft"], [prompt for prompt in prompts for _ in range(config.best_of)])
    sampling = config.model_dump(include={"max_new_tokens", "batch_size"})
    answers, before, total = {}, 0, sum(len(asked) for _, asked in jobs.values())
    with Tracker(stage.directory, total_steps=total, report_to=config.report_to, description=stage.name) as tracker:

        def progress(done: int, tokens: int) -> None:
            tracker.log(before + done, {"completions": before + done}, tokens=tokens)
            if stage.stop_requested():
                raise Interrupted("stopped while sampling; the samples are drawn anew.")

        for number, (name, (model, asked)) in enumerate(jobs.items()):
            # A seed for each model: with a common one two models' samples would not be independent.
            sampling["seed"] = len(jobs) * config.seed + number
            answers[name] = complete_shared(model, tokenizer, asked, **sampling, state=state, progress=progress)
            before += len(asked)
    return answers, answers.pop("many")


if __name__ == "__main__":
    run(main, EvaluationConfig, __doc__)
