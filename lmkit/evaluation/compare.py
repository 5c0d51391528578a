"""The models of one chain side by side on the same prompts: gold and learned scores, win rate, KL, lengths, samples.

In the metrics `gold/sft` is the mean over prompts of model `sft`; `win_rate/ppo_vs_sft` comes with `_low` and `_high`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.evaluation.preference import best_of, best_of_kl, component_means, gold_scores, share, wins
from lmkit.generation.complete import Completion
from lmkit.models.heads import completion_scores

Answers = Mapping[str, Sequence[Completion]]


@torch.no_grad()
def completion_logprobs(model: PreTrainedModel, completions: Sequence[Completion], batch_size: int = 64) -> Tensor:
    """Summed log-probability of each completion's ids, stop token included, given its prompt: float32 [N], on CPU."""
    totals = []
    for start in range(0, len(completions), batch_size):
        batch = completions[start : start + batch_size]
        ids = pad_sequence([torch.tensor(c.prompt_ids + c.ids) for c in batch], batch_first=True).to(model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        drawn = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)  # [B, T - 1]: position t holds token t + 1
        position = torch.arange(1, ids.shape[1], device=ids.device)
        first = torch.tensor([len(c.prompt_ids) for c in batch], device=ids.device)
        end = torch.tensor([len(c.prompt_ids) + len(c.ids) for c in batch], device=ids.device)
        counted = (position >= first[:, None]) & (position < end[:, None])
        totals.append(drawn.masked_fill(~counted, 0).sum(1).cpu())
    return torch.cat(totals)


def sequence_kl(policy: PreTrainedModel, reference: PreTrainedModel, completions: Sequence[Completion]) -> np.ndarray:
    """Log ratio of each whole completion, sampled from `policy`: [N]. Its mean is the k1 estimate of KL in nats."""
    ratio = completion_logprobs(policy, completions) - completion_logprobs(reference, completions)
    return ratio.double().numpy()


def model_scores(model: PreTrainedModel, completions: Sequence[Completion]) -> np.ndarray:
    """A reward model's centred score of each completion, read at its last token: [N]."""
    scores = completion_scores(model, [c.prompt_ids for c in completions], [c.ids for c in completions])
    return scores.double().numpy()


def shape_metrics(answers: Answers) -> dict[str, float]:
    """Mean length in tokens and share of completions that stopped by themselves, of each model."""
    means = {f"length/{name}": float(np.mean(counts)) for name, counts in lengths(answers).items()}
    return means | {f"eos_rate/{name}": float(np.mean([c.finished for c in row])) for name, row in answers.items()}


def judge(
    prompts: Sequence[Any], answers: Answers, many: Sequence[Completion], judge_model: PreTrainedModel | None
) -> tuple[str, dict[str, np.ndarray], np.ndarray] | None:
    """Who judges, the value of every answer by model, and of many samples of each prompt side by side: [P, n].

    The judge is "gold" where the prompts are of tales, else the reward model given as one; None when there is neither.
    """
    repeated = [prompt for prompt in prompts for _ in range(len(many) // len(prompts))]
    gold_many = gold_scores(repeated, [c.text for c in many])
    if gold_many is not None:
        values = {name: _gold(prompts, row) for name, row in answers.items()}
        return "gold", values, np.reshape([scores["gold"] for scores in gold_many], (len(prompts), -1))
    if judge_model is None:
        return None
    values = {name: model_scores(judge_model, row) for name, row in answers.items()}
    return "judge", values, model_scores(judge_model, many).reshape(len(prompts), -1)


def _gold(prompts: Sequence[Any], completions: Sequence[Completion]) -> np.ndarray:
    return np.array([scores["gold"] for scores in gold_scores(prompts, [c.text for c in completions])])


def gold_components(prompts: Sequence[Any], answers: Answers) -> dict[str, float]:
    """`gold_<component>/<model>`: the mean of every component of the gold score."""
    metrics = {}
    for name, row in answers.items():
        means = component_means(gold_scores(prompts, [c.text for c in row]))
        metrics |= {f"gold_{part}/{name}": value for part, value in means.items() if part != "gold"}
    return metrics


def win_rates(prefix: str, values: Mapping[str, Any], against: str) -> dict[str, float]:
    """`<prefix>/<model>_vs_<against>` with its interval, for every other model.

    >>> win_rates("win_rate", {"ppo": [2.0], "sft": [1.0]}, against="sft")
    {'win_rate/ppo_vs_sft': 1.0, 'win_rate/ppo_vs_sft_low': 1.0, 'win_rate/ppo_vs_sft_high': 1.0}
    """
    others = [name for name in values if name != against]
    pairs = [share(f"{prefix}/{name}_vs_{against}", wins(values[name], values[against])) for name in others]
    return {key: value for metrics in pairs for key, value in metrics.items()}


def lengths(answers: Answers) -> dict[str, list[int]]:
    """Tokens of each completion, its stop token included, by model."""
    return {name: [len(c.ids) for c in row] for name, row in answers.items()}


def pick_best(completions: Sequence[Completion], scores: np.ndarray) -> list[Completion]:
    """Of n completions of each prompt, side by side, the one with the highest score. scores: [P, n]."""
    n = scores.shape[1]
    return [completions[row * n + int(best)] for row, best in enumerate(scores.argmax(1))]


def best_of_metrics(scores: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Mean value of best-of-n for n = 1, 2, 4, ... with its KL, and the headroom over one sample.

    scores: the reward model's, values: the judge's, both [P, N].
    """
    sizes = [2**k for k in range(scores.shape[1].bit_length()) if 2**k <= scores.shape[1]]
    metrics = {f"best_of_n/{n}": float(best_of(scores, values, n).mean()) for n in sizes}
    metrics |= {f"best_of_n_kl/{n}": best_of_kl(n) for n in sizes}
    headroom = {
        "headroom/by_reward_model": metrics[f"best_of_n/{sizes[-1]}"] - float(values.mean()),
        "headroom/by_judge": float(values.max(1).mean() - values.mean()),
    }
    return metrics | headroom


def check_same_tokenizer(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Raises BadInput unless all tokenizers have one vocabulary: log ratios and scores are over token ids."""
    (first, reference), *rest = tokenizers.items()
    for name, tokenizer in rest:
        if tokenizer.get_vocab() != reference.get_vocab():
            raise BadInput(
                f"the tokenizers of {first} ({len(reference):,} tokens) and {name} ({len(tokenizer):,} tokens) differ; "
                "models are compared token by token. Give models of one chain."
            )


def side_by_side(prompts: Sequence[Any], answers: Answers, columns: Mapping[str, Mapping[str, Any]]) -> list[dict]:
    """One row per prompt: every model's completion, and under each name of `columns` its value by model."""
    return [
        {
            "prompt": prompt,
            **{name: completions[row].text for name, completions in answers.items()},
            **{key: {name: float(values[row]) for name, values in by.items()} for key, by in columns.items()},
        }
        for row, prompt in enumerate(prompts)
    ]


def table(metrics: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The headline numbers as lines of text: a column per model, then win rate and headroom.

    >>> table({"gold/sft": 3.0, "length/sft": 70.0, "length/ppo": 75.0}, ["sft", "ppo"])
    ['                   sft        ppo', 'gold             3.000          -', 'length          70.000     75.000']
    """
    lines = [" " * 11 + "".join(f"{name:>11}" for name in names)]
    for row in ("gold", "judge", "score", "kl", "length", "eos_rate", "bits_per_byte"):
        if any(f"{row}/{name}" in metrics for name in names):
            cells = [
                f"{metrics[key]:>11.3f}" if (key := f"{row}/{name}") in metrics else f"{'-':>11}" for name in names
            ]
            lines.append(f"{row:<11.11}" + "".join(cells))
    if "win_rate/ppo_vs_sft" in metrics:
        win, low, high = (metrics[f"win_rate/ppo_vs_sft{end}"] for end in ("", "_low", "_high"))
        lines.append(f"ppo against sft by {metrics['judge']}: win rate {win:.3f} [{low:.3f}, {high:.3f}]")
    if "headroom/by_reward_model" in metrics:
        lines.append(f"headroom of best-of-n over one sample: {metrics['headroom/by_reward_model']:.3f}")
    return lines
