"""Word vectors: CBOW or skip-gram with negative sampling, on token shards.

Reads   --tokenizer and --shards, as the tokenizer stage writes them
Writes  output_dir/vectors: both tables as safetensors, and the tokenizer; metrics.jsonl

    python recipes/embeddings.py --objective skipgram
    lmkit embeddings runs/tiny/embeddings/vectors owl fox --analogy fox,owl,goat
    python recipes/pretrain.py --embeddings runs/tiny/embeddings/vectors      # a model that starts from them

They predict no text: what generates is a language model that starts from them.
"""

from pathlib import Path
from typing import Literal

from lmkit.config import StageConfig, knob, setting, source
from lmkit.processes import require_one
from lmkit.stage import Stage, run


class EmbeddingsConfig(StageConfig):
    output_dir: Path = knob(Path("runs/tiny/embeddings"), "where the stage writes")
    tokenizer: Path = setting(Path("runs/tiny/tokenizer/tokenizer"), "tokenizer directory")
    shards: Path = source(Path("runs/tiny/tokenizer/shards"), "folder with the split train")
    objective: Literal["cbow", "skipgram"] = setting("skipgram", "a token from those around it, or the other way round")
    hidden_size: int = setting(128, "width of the vectors; a model that starts from them has the same", gt=0)
    window: int = setting(5, "tokens on either side, at most", gt=0)
    num_negatives: int = setting(5, "noise tokens a pair", gt=0)
    subsample: float | None = setting(1e-3, "frequency from which tokens are thinned out; null: none", gt=0)
    num_epochs: int = setting(5, "passes over the corpus", gt=0)
    learning_rate: float = setting(0.2, "Adagrad's, falling linearly to 0", gt=0)
    batch_tokens: int = setting(4096, "tokens an update goes through", gt=0)
    logging_steps: int = knob(100, "updates between two rows of metrics.jsonl", gt=0)


def main(config: EmbeddingsConfig) -> Path:
    require_one("embeddings.py")
    stage = Stage("embeddings", config)
    if stage.finished:
        return stage.directory
    import numpy as np

    from lmkit.data.shards import Shards
    from lmkit.models.embeddings import describe, num_updates, save_vectors, train
    from lmkit.tokenization.read import load_tokenizer
    from lmkit.tracking import Tracker

    tokenizer, shards = load_tokenizer(config.tokenizer), Shards.open(config.shards / "train")
    shards.check_tokenizer(tokenizer)
    tokens = shards.tokens
    names = ("objective", "hidden_size", "window", "num_negatives", "subsample", "num_epochs", "learning_rate")
    options = {name: getattr(config, name) for name in (*names, "batch_tokens", "seed")}
    total = num_updates(len(tokens), config.num_epochs, config.batch_tokens)
    with stage, Tracker(stage.directory, total_steps=total, report_to=config.report_to) as tracker:
        stage.say(f"embeddings: {len(tokenizer)} tokens, width {config.hidden_size}, from {len(tokens):,} tokens")
        losses, passed = [], []

        def log(update: int, loss: float, num_tokens: int) -> None:
            losses.append(loss)
            passed.append(num_tokens)
            if update % config.logging_steps == 0 or update == total:
                row = {"loss": float(np.mean(losses[-config.logging_steps :]))}
                tracker.log(update, row, tokens=sum(passed))
                passed.clear()

        vectors, contexts = train(tokens, len(tokenizer), **options, log=log)
        with stage.seal("vectors") as folder:
            save_vectors(folder, vectors, contexts, config.objective, tokenizer)
        last = float(np.mean(losses[-config.logging_steps :]))
        ranked = (tokenizer.decode([i]).strip() for i in np.argsort(-np.bincount(tokens, minlength=len(tokenizer))))
        words = [word for word in ranked if len(word) > 3 and word.isalpha()][:4]
        stage.say(f"embeddings: {last:.4f} nats a pair at the end")
        stage.say(f"sample: {describe(stage.directory / 'vectors', words)}")
        stage.finish({"loss": last, "num_tokens": len(tokens), "num_updates": total})
    return stage.directory


if __name__ == "__main__":
    run(main, EmbeddingsConfig, __doc__)
