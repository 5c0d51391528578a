"""A language model on held-out text, while it trains and at the end: scores and continuations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.data.shards import Shards
from lmkit.evaluation.bits_per_byte import bits_per_byte
from lmkit.generation.sampler import sample
from lmkit.tokenization.chat import stop_token_ids
from lmkit.training.losses import CausalLMLoss
from lmkit.training.objectives import Objective

PROMPT_TOKENS, NEW_TOKENS = 16, 64
RARE = 0.01  # share of the text below which a token is told by its document rather than by the language


@dataclass(frozen=True)
class HeldOut:
    """Whole documents from the start of a split, each read alone behind the end-of-text token before it.

    tokens: ids [N]; document_offsets: [D + 1], where each document begins and the last one ends.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    objective: Objective | None = None

    @classmethod
    def start_of(
        cls,
        shards: Shards,
        num_tokens: int,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        objective: Objective | None = None,
    ) -> HeldOut:
        """The documents within the first `num_tokens` of a split; a part of the first one if it is longer."""
        offsets = shards.first_documents(num_tokens)
        return cls(shards.tokens[: offsets[-1]], offsets, tokenizer, context_length, objective)

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """Bits per byte, nats per token and perplexity, in windows of `context_length` tokens of which each scores its
        second half, and what `copying` finds; of a model that does not write, `asked`."""
        if self.objective and not self.objective.writes:
            return self.asked(model)
        found = self._score(model, self.context_length // 2)
        scores = {f"eval/{name}": found[name] for name in ("bits_per_byte", "nats_per_token", "perplexity")}
        return scores | self.copying(model)

    @torch.no_grad()
    def copying(self, model: PreTrainedModel, num_documents: int = 64) -> dict[str, float]:
        """Nats per token of rare tokens (each below 1 % of the text) where their document has them for the first time,
        and where it had them before: a model that can copy finds the second cheap.

        Of the first documents, the first window of each; nothing for a group without a token.
        """
        rare = np.bincount(self.tokens) / len(self.tokens) < RARE
        losses: dict[str, list[np.ndarray]] = {"first": [], "repeated": []}
        for start, end in itertools.pairwise(self.document_offsets[: num_documents + 1].tolist()):
            document = np.asarray(self.tokens[start : min(end, start + self.context_length)], dtype=np.int64)
            row = torch.tensor([self.tokenizer.eos_token_id, *document.tolist()], device=model.device)
            logits = model(input_ids=row[None, :-1], use_cache=False).logits[0].float()
            nats = F.cross_entropy(logits, row[1:], reduction="none").cpu().numpy()
            first = np.zeros(len(document), dtype=bool)
            first[np.unique(document, return_index=True)[1]] = True
            losses["first"].append(nats[first & rare[document]])
            losses["repeated"].append(nats[~first & rare[document]])
        found = {name: np.concatenate(parts) for name, parts in losses.items()}
        return {f"eval/rare_{name}_nats_per_token": part.mean().item() for name, part in found.items() if len(part)}

    def unstrided_scores(self, model: PreTrainedModel) -> dict[str, float | int]:
        """The same in windows that do not overlap, and what both were read with: context and stride, in tokens."""
        if self.objective and not self.objective.writes:
            return {}
        found = self._score(model, self.context_length)
        numbers = {f"eval/unstrided_{name}": found[name] for name in ("bits_per_byte", "perplexity")}
        return numbers | {"eval/context_length": self.context_length, "eval/stride": self.context_length // 2}

    def continuations(self, model: PreTrainedModel, seed: int = 0, num_documents: int = 3) -> list[dict[str, str]]:
        """Rows of prompt and completion at temperature 1: the start of a document, and of the first held-out ones.

        The same prompts and the same draws at every call, so that what changes is the model. The attention that
        training uses has no cache; the model has its own one while it samples. Of a model that does not write: what it
        is shown, and what it finds most likely at the places it is asked about.
        """
        if self.objective and not self.objective.writes:
            return self._answers(model, num_documents)
        starts = self.document_offsets[:-1][:num_documents]
        room = min(NEW_TOKENS, self.context_length // 2)
        length = min(PROMPT_TOKENS, self.context_length - room - 1)
        ends = np.minimum(starts + length, self.document_offsets[1:][:num_documents] - 1)
        stops = stop_token_ids(self.tokenizer)
        prompts = [[], *(self.tokens[start:end].tolist() for start, end in zip(starts, ends))]
        options = {"max_new_tokens": room, "stop_token_ids": stops, "generator": torch.Generator().manual_seed(seed)}
        drawn = sample(model, [[stops[-1], *prompt] for prompt in prompts], **options)
        texts = [
            [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (p, drawn.ids(row))]
            for row, p in enumerate(prompts)
        ]
        return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]

    @torch.no_grad()
    def asked(self, model: PreTrainedModel) -> dict[str, float]:
        """Nats per token that the objective asks for, in the first window of each document, alike at every call."""
        loss, sums = CausalLMLoss(model), torch.zeros(2, dtype=torch.float64)
        for batch in self._batches(model.device):
            sums += torch.stack(loss(**batch)).double().cpu()
        nats = (sums[0] / sums[1]).item()
        return {"eval/nats_per_token": nats, "eval/perplexity": math.exp(nats)}

    @torch.no_grad()
    def _answers(self, model: PreTrainedModel, num_documents: int) -> list[dict[str, str]]:
        batch = next(self._batches(model.device, num_documents))
        labels = batch.pop("labels").cpu()
        likely = model(**batch, use_cache=False).logits.argmax(-1).cpu()
        return [
            {"prompt": self.tokenizer.decode(shown), "completion": self.tokenizer.decode(said[asked != -100])}
            for shown, said, asked in zip(batch["input_ids"], likely, labels)
        ]

    def _batches(self, device: torch.device, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """The documents' first windows as the objective shows them."""
        for first in range(0, len(self.document_offsets) - 1, size):
            spans = list(itertools.pairwise(self.document_offsets[first : first + size + 1].tolist()))
            labels = torch.full((len(spans), self.context_length), -100)
            for row, (start, end) in zip(labels, spans):
                tokens = self.tokens[start : min(end, start + self.context_length)]
                row[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            inputs = F.pad(labels, (1, -1), value=self.tokenizer.eos_token_id).clamp(min=0)
            rows = range(first, first + len(spans))
            batch = self.objective.batch({"input_ids": inputs, "labels": labels}, rows, seed=0)
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def _score(self, model: PreTrainedModel, stride: int) -> dict[str, float | int]:
        options = {"stride": stride, "batch_size": 32, "document_offsets": self.document_offsets}
        return bits_per_byte(model, self.tokens, self.tokenizer, self.context_length, **options)
