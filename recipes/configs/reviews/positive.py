"""How positive the models of a reviews run write: the share of their sentences that a classifier takes for praise.

    python recipes/configs/reviews/positive.py ../shared/data/sentiment runs/reviews

The classifier is naive Bayes on words and pairs of words, learnt from the sentences that neither the reward model
learnt from nor `prepare.py` held out; on the latter it is judged. One sample a held-out prompt and model, as the
evaluation stage drew them; the classifier reads prompt and completion.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable
from math import log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from datasets import load_from_disk
from prepare import sentences

from lmkit.evaluation.preference import bootstrap_interval


def features(text: str) -> set[str]:
    words = text.split()
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def learn(positive: Iterable[str], negative: Iterable[str]):
    """A function text -> log odds of praise: naive Bayes on the presence of features, one added to each count."""
    counts = [Counter(f for text in texts for f in features(text)) for texts in (positive, negative)]
    totals = [sum(count.values()) + len(counts[0] | counts[1]) for count in counts]
    odds = {f: log((counts[0][f] + 1) / totals[0]) - log((counts[1][f] + 1) / totals[1]) for f in counts[0] | counts[1]}
    return lambda text: sum(odds.get(f, 0.0) for f in features(text))


def main(source: Path, run: Path) -> None:
    sides = [[" ".join(words) for words in sentences(source / f"rt-polarity.{name}")] for name in ("pos", "neg")]
    pairs = load_from_disk(str(run / "preferences" / "data"))["train"]
    used = {f"{row['prompt']} {row[side]}" for row in pairs for side in ("chosen", "rejected")}
    heldout = set((run.parent / f"{run.name}-data" / "text.heldout.txt").read_text(encoding="utf-8").split("\n\n"))
    heldout = {text.strip() for text in heldout}
    log_odds = learn(*([t for t in side if t not in used | heldout] for side in sides))
    right = [(log_odds(t) > 0) == (side == 0) for side in (0, 1) for t in sides[side] if t in heldout]
    print(f"classifier: {sum(right) / len(right):.3f} right on {len(right)} held-out sentences")
    rows = [json.loads(line) for line in (run / "evaluation" / "results" / "samples.jsonl").open(encoding="utf-8")]
    metrics = json.loads((run / "evaluation" / "results" / "metrics.json").read_text(encoding="utf-8"))
    for name in [name for name in ("base", "sft", "ppo") if name in rows[0]] + [n for n in rows[0] if "best_of" in n]:
        good = [log_odds(f"{row['prompt']} {row[name]}") > 0 for row in rows]
        low, high = bootstrap_interval(good)
        distinct = len({row[name] for row in rows}) / len(rows)
        print(
            f"{name}: {sum(good) / len(good):.3f} [{low:.3f}, {high:.3f}] positive, {distinct:.2f} distinct, "
            f"{metrics[f'length/{name}']:.1f} tokens, {metrics[f'eos_rate/{name}']:.2f} ended"
        )
    print(f"KL from sft to ppo: {metrics['kl/ppo']:.2f} nats a completion")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
