"""One number per token from a language model: reward models and value models.

A reward or value model is an ordinary Hugging Face sequence-classification directory with one label: a causal
backbone (`model.base_model`) and a linear layer `model.score`. Its own `forward` looks for the last token by comparing
ids with the pad id, which drops a real token equal to it; here the last token is found by length.

Shapes: B batch, T tokens, D width, N sequences.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, DynamicCache, PreTrainedModel

from lmkit.models.attention import is_plain

# How many times fewer tokens make up for a second pass: with 1.19 times fewer, scoring took 0.89 of the time.
SHARING_PAYS = 1.15


class ValueHead(nn.Module):
    """Hidden states [..., D] to float32 values [...]: a linear layer that starts at zero, so V is 0 everywhere."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return project(hidden, self.weight)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states [..., D] times a scalar head's weight [1, D], in float32 even under autocast. Returns [...]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.float(), weight.float()).squeeze(-1)


def token_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """A score for every prefix: float32 [B, T], the head of a sequence-classification model at each token.

    `input_ids` is [B, T]. Right padding needs no `attention_mask`, because no real token of a causal model sees what
    follows it; left padding does. Scores at padding are meaningless. A stock head has no bias, so the mean score that
    centring removes lies in the model's `config.json` as `score_mean`; other readers of the directory see it added.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        found = "no layer `score`" if head is None else f"a head {head}"
        raise ValueError(
            f"{type(model).__name__} has {found}; a reward or value model is a causal ...ForSequenceClassification "
            "with num_labels=1."
        )
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return _centred(model, hidden)


def _centred(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    scores = project(hidden, model.score.weight) - getattr(model.config, "score_mean", 0.0)
    return scores if model.score.bias is None else scores + model.score.bias.float()


@torch.no_grad()
def last_token_scores(model: PreTrainedModel, sequences: list[list[int]], batch_size: int = 64) -> Tensor:
    """The score at the last token of each sequence of ids: float32 [N], on the CPU, in the order given.

    Sequences are sorted by length, right-padded and scored `batch_size` at a time. The last token is taken by length,
    so neither the pad id nor the company a sequence keeps changes its score. The model is left in the mode it was in.
    """
    if empty := [index for index, ids in enumerate(sequences) if not ids]:
        raise ValueError(f"sequence {empty[0]} is empty; a score needs at least one token.")
    scores = torch.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(sequences[row]) for row in rows], batch_first=True).to(model.device)
        last = torch.tensor([len(sequences[row]) - 1 for row in rows], device=model.device)
        batch = token_scores(model, ids).gather(1, last[:, None]).squeeze(1)
        scores[rows] = batch.cpu()
    model.train(training)
    return scores


@torch.no_grad()
def completion_scores(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], batch_size: int = 64
) -> Tensor:
    """The score at the last token of each completion behind its prompt: float32 [N], on the CPU, in the order given.

    Where completions share prompts to the extent that it pays, the backbone runs once over each prompt of a batch, and
    the completions go on from its keys and values. Elsewhere, and for models that are no plain causal Transformer of
    transformers, these are the `last_token_scores` of the whole sequences, to which they are equal but for rounding.
    """
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    once = sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(map(len, completions))
    stock = type(model).__module__.startswith("transformers.") and is_plain(model)
    if sum(map(len, sequences)) < SHARING_PAYS * once or not (stock and all(prompts) and all(completions)):
        return last_token_scores(model, sequences, batch_size)
    scores = torch.empty(len(prompts))
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row], len(completions[row])))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        scores[rows] = _scores_behind_prompts(model, [prompts[r] for r in rows], [completions[r] for r in rows]).cpu()
    model.train(training)
    return scores


def _scores_behind_prompts(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Scores [N] of completions; each different prompt is run once, left-padded so that all end in one place."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    which = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in numbers], device=model.device)
    ids = pad_sequence([torch.tensor(prompt) for prompt in numbers], batch_first=True, padding_side="left")
    width = ids.shape[1]
    mask = torch.arange(width, device=model.device) >= width - lengths[:, None]  # [prompts, P], True at real tokens
    places = (mask.cumsum(1) - 1).clamp(min=0)
    seen = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    model.base_model(input_ids=ids.to(model.device), attention_mask=mask.long(), position_ids=places, **seen)
    seen["past_key_values"].batch_select_indices(which)
    ids = pad_sequence([torch.tensor(completion) for completion in completions], batch_first=True).to(model.device)
    mask = torch.cat([mask[which], torch.ones_like(ids, dtype=torch.bool)], dim=1).long()
    last = torch.tensor([len(completion) - 1 for completion in completions], device=model.device)
    # What stands behind a completion stays within the positions that the longest sequence has.
    places = lengths[which, None] + torch.minimum(torch.arange(ids.shape[1], device=model.device), last[:, None])
    hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, **seen).last_hidden_state
    return _centred(model, hidden[torch.arange(len(last), device=model.device), last])


def value_model_from(reward_model: PreTrainedModel) -> PreTrainedModel:
    """A critic that starts as an independent copy of the reward model, backbone and head, with trainable weights."""
    return copy.deepcopy(reward_model).requires_grad_(True)


def classifier_from(policy: PreTrainedModel, head: ValueHead) -> PreTrainedModel:
    """A policy's backbone and a value head as one sequence-classification model, ready for `save_pretrained`.

    Weights are copied. `token_scores` of the result equals `head` applied to the policy's last hidden states.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    config.architectures = None
    model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head.weight)
    return model
