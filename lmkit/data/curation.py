"""Prompts worth sampling for: duplicates left out, and what is left divided into clusters by what a model makes of it.

Needs the extra `lmkit[curation]` (datasketch, scikit-learn).
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lmkit.artifact import seal, write_json
from lmkit.data.sources import load_prompts
from lmkit.errors import BadInput
from lmkit.models.load import load_language_model
from lmkit.tokenization.chat import render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "curation"  # of a run; the report reads clusters.json there
SHINGLE = 5  # characters of a shingle: prompts are too short for shingles of words
NUM_HASHES = 128


def curate(
    source: str,
    run: Path,
    *,
    num_prompts: int | None = None,
    num_clusters: int = 16,
    threshold: float = 0.8,
    seed: int = 0,
) -> dict[str, Any]:
    """Seals RUN/curation, prompts.jsonl and clusters.json, from a file of prompts as the run's SFT model reads them.

    num_prompts: how many to keep, evenly from the clusters; None: all that repeat none. Returns what clusters.json
    holds: counts, and the clusters of `cluster_table`. BadInput when the folder is there already.
    """
    target = run / FOLDER
    if target.exists():
        raise BadInput(f"{target} is there already. Move it aside, or remove it.")
    rows = load_prompts(source)
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in rows["prompt"]]
    kept, dropped = without_duplicates(texts, threshold)
    model, tokenizer = load_language_model(run / "sft" / "model")
    vectors = embed(model, tokenizer, [rows["prompt"][row] for row in kept])
    clusters, distances = cluster(vectors, num_clusters, seed)
    chosen = evenly(clusters, min(num_prompts or len(kept), len(kept)), seed)
    found = {
        "source": str(source),
        "num_prompts": len(rows),
        **{f"num_{name}_duplicates": count for name, count in dropped.items()},
        "num_chosen": len(chosen),
        "clusters": cluster_table(clusters, distances, chosen, [texts[row] for row in kept]),
    }
    with seal(target) as folder:
        write_json(folder / "clusters.json", found)
        lines = [json.dumps(rows[kept[row]], ensure_ascii=False) + "\n" for row in chosen]
        (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return found


def without_duplicates(texts: Sequence[str], threshold: float = 0.8) -> tuple[list[int], dict[str, int]]:
    """Rows of the texts that repeat none before them, and counts of those left out: `exact` and `near`.

    Texts are compared by their words in lower case. Near means a Jaccard similarity of at least `threshold` between the
    sets of five characters in a row: MinHash finds the candidates (Broder 1997), and their similarity is then computed
    exactly, so no two that are less alike are taken for duplicates; a pair hardly above the threshold may be missed.
    """
    datasketch = _extra("datasketch")
    index, kept, counts = datasketch.MinHashLSH(threshold=threshold, num_perm=NUM_HASHES), [], {"exact": 0, "near": 0}
    seen: set[str] = set()
    shingles: dict[int, set[str]] = {}
    for row, text in enumerate(texts):
        words = " ".join(re.findall(r"\w+", text.lower())) or text
        if words in seen:
            counts["exact"] += 1
            continue
        seen.add(words)
        own = {words[i : i + SHINGLE] for i in range(max(len(words) - SHINGLE + 1, 1))}
        hashes = datasketch.MinHash(num_perm=NUM_HASHES, seed=0)
        hashes.update_batch([shingle.encode() for shingle in sorted(own)])
        if any(len(own & shingles[other]) >= threshold * len(own | shingles[other]) for other in index.query(hashes)):
            counts["near"] += 1
            continue
        index.insert(row, hashes)
        shingles[row] = own
        kept.append(row)
    return kept, counts


@torch.no_grad()
def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], batch_size: int = 64
) -> np.ndarray:
    """A direction for every prompt, float32 [N, D] of length 1: the model's last hidden states, averaged over tokens.

    The mean over all prompts is taken off first: it is most of every hidden state and says nothing of a prompt.
    """
    means = []
    for start in range(0, len(prompts), batch_size):
        rows = [torch.tensor(render(tokenizer, prompt)[0]) for prompt in prompts[start : start + batch_size]]
        ids = pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        counted = torch.arange(ids.shape[1], device=model.device) < lengths
        means.append((hidden * counted[..., None]).sum(1).div(lengths).cpu())
    vectors = torch.cat(means)
    return torch.nn.functional.normalize(vectors - vectors.mean(0)).numpy()


def cluster(vectors: np.ndarray, num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of every vector by k-means, the largest first, and its distance from that one's mean: both [N]."""
    if num_clusters > len(vectors):
        raise BadInput(f"{num_clusters} clusters of {len(vectors)} prompts: at most one for each. Ask for fewer.")
    fitted = _extra("sklearn.cluster").KMeans(num_clusters, n_init=4, random_state=seed).fit(vectors)
    by_size = np.argsort(-np.bincount(fitted.labels_, minlength=num_clusters), kind="stable")
    distances = np.linalg.norm(vectors - fitted.cluster_centers_[fitted.labels_], axis=1)
    return np.argsort(by_size)[fitted.labels_], distances


def evenly(clusters: np.ndarray, num: int, seed: int) -> list[int]:
    """`num` rows, in order, as many of each cluster as there are to have: one of each in turn, drawn at random.

    >>> evenly(np.array([0, 0, 0, 0, 1, 2]), 4, seed=0)[-2:]
    [4, 5]
    """
    order = np.random.default_rng(seed).permutation(len(clusters))
    turns = np.zeros(len(clusters), dtype=int)
    for name in np.unique(clusters):
        members = order[clusters[order] == name]
        turns[members] = np.arange(len(members))
    return sorted(int(row) for row in order[np.argsort(turns[order], kind="stable")][:num])


def cluster_table(
    clusters: np.ndarray, distances: np.ndarray, chosen: Sequence[int], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each cluster: its size, how many of it are chosen, its mean distance and its most typical text."""
    taken, table = set(chosen), []
    for name in np.unique(clusters):
        members = np.flatnonzero(clusters == name)
        typical = members[distances[members].argmin()]
        table.append(
            {
                "cluster": int(name),
                "size": len(members),
                "chosen": sum(int(row) in taken for row in members),
                "distance": float(distances[members].mean()),
                "typical": texts[typical],
            }
        )
    return table


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise BadInput(f"curating prompts needs {name}. Install it: pip install -e '.[curation]'.") from None
