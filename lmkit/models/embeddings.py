"""Word vectors: CBOW and skip-gram with negative sampling (Mikolov et al. 2013, arXiv:1301.3781 and 1310.4546).

    vectors, contexts = train(tokens, vocab_size, objective="skipgram")        # two tables, [V, D] each
    nearest(vectors, vectors[king], 5)
    analogy(vectors, man, king, woman, 3)                                      # queen among the first

Skip-gram: the vector v of a token is to tell the tokens around it, each by its context vector u, from tokens drawn as
noise; CBOW: the mean of the vectors around a token is to tell the token. The loss of a pair, of which
`num_negatives` = k noise tokens n are drawn in proportion to count^0.75:

    -log sigmoid(u . v) - k E_n [log sigmoid(-u_n . v)]

Its minimum over free scores u . v is log(P(u, v) / P(u) P(v)) - log k with the noise's own P(u): the pointwise mutual
information, shifted (Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization").

Two things differ from word2vec's C program, for speed: the noise tokens of an update are shared by its pairs and
weighted so that their expectation is as above (Ji et al. 2016, arXiv:1604.04661), and the step is Adagrad's.
Every random draw is a function of seed, epoch and update. The tokens are one stream, as for `lmkit.models.ngram`.

Shapes: N tokens, V vocabulary, D width, S segments of L tokens, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.data.order import shuffled
from lmkit.errors import BadInput
from lmkit.models.start import difference
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.read import load_tokenizer

Objective = Literal["cbow", "skipgram"]
FILE = "vectors.safetensors"
SEGMENT = 32  # tokens that share one matrix product with the tokens around them
SHARED_NOISE = 64  # noise tokens of one update


def train(
    tokens: np.ndarray,
    vocab_size: int,
    *,
    objective: Objective = "skipgram",
    hidden_size: int = 128,
    window: int = 5,
    num_negatives: int = 5,
    subsample: float | None = 1e-3,
    num_epochs: int = 5,
    learning_rate: float = 0.2,
    batch_tokens: int = 4096,
    seed: int = 0,
    log: Callable[[int, float, int], None] = lambda update, loss, num_tokens: None,
) -> tuple[Tensor, Tensor]:
    """Vectors and context vectors, float32 [V, D] each, of the tokens [N], in `num_updates` updates.

    window: each token sees 1 to `window` tokens on either side, drawn anew in each epoch, so that near ones count more.
    subsample: an occurrence of a token of frequency f is left out with probability 1 - sqrt(subsample / f); None: none.
    learning_rate: Adagrad's, falling linearly to 0. log: told of each update: its number from 1, its mean loss in nats
    a pair, the tokens it went through. Raises BadInput for less than two tokens.
    """
    if len(tokens) < 2:
        raise BadInput(f"word vectors need tokens beside each other; found {len(tokens)}. Give more text.")
    counts = np.bincount(tokens, minlength=vocab_size)
    kept, noise = keep_probabilities(counts, subsample), np.cumsum(noise_distribution(counts))
    start = torch.rand(vocab_size, hidden_size, generator=torch.Generator().manual_seed(seed)) - 0.5
    vectors = (start / hidden_size).requires_grad_()
    contexts = torch.zeros(vocab_size, hidden_size, requires_grad=True)
    optimizer = torch.optim.Adagrad([vectors, contexts], lr=learning_rate, fused=True)
    total = num_updates(len(tokens), num_epochs, batch_tokens)
    for update in range(total):
        epoch, part = divmod(update, total // num_epochs)
        if part == 0:
            stream = tokens[np.random.default_rng([seed, epoch]).random(len(tokens)) < kept[tokens]]
            padded = np.concatenate([np.full(window, -1), stream, np.full(window + SEGMENT, -1)])
            numbers = np.arange(-(-len(stream) // SEGMENT))
            parts = np.array_split(shuffled(numbers, max(1, len(numbers)), seed + epoch), total // num_epochs)
        generator = np.random.default_rng([seed, epoch, part])
        places = parts[part][:, None] * SEGMENT + np.arange(SEGMENT + 2 * window)
        rows, reach = padded[places], generator.integers(1, window + 1, (len(places), SEGMENT))
        negatives = np.searchsorted(noise, generator.random(SHARED_NOISE) * noise[-1], side="right")
        drawn = [torch.from_numpy(array) for array in (rows, reach, negatives)]
        loss, num_pairs = loss_of(vectors, contexts, *drawn, num_negatives, objective)
        mean = loss / num_pairs.clamp(min=1)
        mean.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        log(update + 1, mean.item(), min(batch_tokens, len(tokens) - part * batch_tokens))
    return vectors.detach(), contexts.detach()


def num_updates(num_tokens: int, num_epochs: int, batch_tokens: int) -> int:
    """Updates of `train`: each goes through `batch_tokens` of the stream, of which subsampling leaves fewer."""
    return num_epochs * -(-num_tokens // batch_tokens)


def loss_of(
    vectors: Tensor,
    contexts: Tensor,
    rows: Tensor,
    reach: Tensor,
    negatives: Tensor,
    num_negatives: float,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the pairs in segments with the tokens around them, and the number of pairs.

    rows: ids [S, W + L + W], -1 outside the stream; the L in the middle are centres. reach: [S, L], how far each centre
    sees on either side. negatives: [K], noise shared by all, each counted num_negatives / K times for every pair. A
    pair is a centre and one token it sees (skip-gram), or a centre and all of them (CBOW).
    """
    length = reach.shape[1]
    window = (rows.shape[1] - length) // 2
    distance = (torch.arange(rows.shape[1]) - torch.arange(length)[:, None] - window).abs()
    valid, ids = rows >= 0, rows.clamp(min=0)
    centres = slice(window, window + length)
    sees = (
        (distance > 0) & (distance <= reach[..., None]) & valid[:, None] & valid[:, centres, None]
    )  # [S, L, W + L + W]
    if objective == "skipgram":
        sources = vectors[ids[:, centres]]
        positive = (F.softplus(-(sources @ contexts[ids].mT)) * sees).sum()
        pairs = sees.sum(2)
    else:
        pairs = sees.any(2)
        weights = sees / sees.sum(2, keepdim=True).clamp(min=1)
        sources = weights @ vectors[ids]
        positive = (F.softplus(-(sources * contexts[ids[:, centres]]).sum(2)) * pairs).sum()
    against = F.softplus(sources @ contexts[negatives].T).sum(2)  # [S, L]
    return positive + num_negatives / len(negatives) * (against * pairs).sum(), pairs.sum()


def keep_probabilities(counts: np.ndarray, subsample: float | None) -> np.ndarray:
    """Probability [V] that an occurrence of each token is kept (1310.4546, equation 5).

    >>> keep_probabilities(np.array([96, 4, 0]), 0.04).round(3).tolist()
    [0.204, 1.0, 1.0]
    """
    if subsample is None:
        return np.ones(len(counts))
    frequencies = counts / counts.sum()
    return np.minimum(1, np.sqrt(subsample / np.maximum(frequencies, subsample)))


def noise_distribution(counts: np.ndarray) -> np.ndarray:
    """Probability [V] of each token as noise: count^0.75, which draws rare tokens more often than they occur.

    >>> noise_distribution(np.array([16, 1, 0])).round(3).tolist()
    [0.889, 0.111, 0.0]
    """
    powers = counts**0.75
    return powers / powers.sum()


# ------------------------------------------------------------------------------------------------------- what they say


def cosine_table(vectors: Tensor | np.ndarray) -> np.ndarray:
    """Cosines of all pairs of vectors [n, D]: [n, n]. Of one-hot codes it is the identity: no word is like another.

    >>> cosine_table(np.eye(3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    directions = unit(vectors)
    return directions @ directions.T


def unit(vectors: Tensor | np.ndarray) -> np.ndarray:
    """Vectors [..., D] scaled to length 1, float64; zero stays zero."""
    vectors = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def nearest(
    vectors: Tensor | np.ndarray, query: Tensor | np.ndarray, num: int, leave_out: Sequence[int] = ()
) -> list[tuple[int, float]]:
    """The `num` ids whose vectors [V, D] have the highest cosine with `query` [D], with it; `leave_out` aside.

    >>> [i for i, cosine in nearest(np.array([[1.0, 0], [1, 1], [0, 1], [-1, 0]]), np.array([2, 1.0]), 2)]
    [1, 0]
    """
    cosines = unit(vectors) @ unit(query)
    cosines[list(leave_out)] = -np.inf
    best = np.argsort(-cosines, kind="stable")[: min(num, len(cosines) - len(set(leave_out)))]
    return [(int(i), float(cosines[i])) for i in best]


def analogy(vectors: Tensor | np.ndarray, a: int, b: int, c: int, num: int = 1) -> list[tuple[int, float]]:
    """What is to c as b is to a: the ids nearest to b - a + c, of unit vectors, these three left out.

    Mikolov, Yih and Zweig 2013, "Linguistic regularities in continuous space word representations".
    """
    directions = unit(vectors)
    return nearest(directions, directions[b] - directions[a] + directions[c], num, (a, b, c))


def describe(folder: Path, words: Sequence[str], analogies: Sequence[Sequence[str]] = (), num: int = 5) -> str:
    """What word vectors say of words, as text: nearest tokens, cosines beside those of one-hot codes, analogies."""
    vectors, objective, tokenizer = load_vectors(folder)
    ids = [token_of(tokenizer, word) for word in words]
    lines = [f"{objective} vectors of {vectors.shape[0]:,} tokens, width {vectors.shape[1]}"]

    def named(found: list[tuple[int, float]]) -> str:
        return ", ".join(f"{tokenizer.decode([i]).strip()!r} {cosine:.3f}" for i, cosine in found)

    lines += [f"nearest to {w!r}: {named(nearest(vectors, vectors[i], num, [i]))}" for w, i in zip(words, ids)]
    for title, table in (("cosines", cosine_table(vectors[ids])), ("one-hot", cosine_table(np.eye(len(ids))))):
        width = max(map(len, [title, *words]))
        lines.append("  ".join(word.rjust(width) for word in [title, *words]))
        lines += ["  ".join([w.rjust(width), *(f"{c:{width}.3f}" for c in row)]) for w, row in zip(words, table)]
    for a, b, c in analogies:
        found = analogy(vectors, *(token_of(tokenizer, word) for word in (a, b, c)), num)
        lines.append(f"{a!r} is to {b!r} as {c!r} is to: {named(found)}")
    return "\n".join(lines)


def token_of(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The one token that is `word`, behind a space if there is such a token; BadInput for a word in several."""
    pieces = [encode_text(tokenizer, text) for text in (f" {word}", word)]
    if whole := [ids for ids in pieces if len(ids) == 1]:
        return whole[0][0]
    cut = "|".join(tokenizer.decode([i]) for i in pieces[1])
    raise BadInput(
        f"{word!r} is no token of this vocabulary ({cut}), so it has no vector of its own. Choose another word, or a "
        "larger vocabulary (`python recipes/tokenizer.py --vocab_size 8192`)."
    )


# ------------------------------------------------------------------------------------------------------ kept and used


def save_vectors(
    folder: Path, vectors: Tensor, contexts: Tensor, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes both tables and the tokenizer whose ids number their rows."""
    tensors = {"vectors": vectors.contiguous(), "contexts": contexts.contiguous()}
    save_file(tensors, Path(folder) / FILE, metadata={"objective": objective})
    tokenizer.save_pretrained(folder)


def load_vectors(folder: Path) -> tuple[Tensor, str, PreTrainedTokenizerBase]:
    """Vectors [V, D], how they were trained, and their tokenizer; BadInput where there are none."""
    path = Path(folder) / FILE
    if not path.is_file():
        inside = (Path(folder) / "vectors" / FILE).is_file()
        do = f"Give {Path(folder) / 'vectors'}" if inside else "Make them with `python recipes/embeddings.py`"
        raise BadInput(f"{folder} holds no word vectors (no {FILE}). {do}.")
    with safe_open(path, "pt") as file:
        return file.get_tensor("vectors"), file.metadata()["objective"], load_tokenizer(folder)


@torch.no_grad()
def start_from(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the word vectors in `folder` the token embeddings of a fresh model, at the scale of those it had.

    BadInput when they were made with another tokenizer, or the model has another vocabulary or width.
    """
    vectors, _, own = load_vectors(folder)
    weight = model.get_input_embeddings().weight
    if vectors.shape != weight.shape:
        raise BadInput(
            f"{folder} holds {vectors.shape[0]:,} word vectors of width {vectors.shape[1]}, the model has embeddings "
            f"for {weight.shape[0]:,} tokens of width {weight.shape[1]}. Give --model.hidden_size {vectors.shape[1]} "
            f"with their tokenizer, or train vectors that fit: `python recipes/embeddings.py --hidden_size "
            f"{weight.shape[1]}` on the same shards."
        )
    if why := difference(own, tokenizer):
        raise BadInput(f"The tokenizer of {folder} {why} the one the shards were made with. Train vectors on those.")
    # The embedding is the output layer too: at another scale the first predictions would be wrong and sure of it.
    weight.copy_(vectors * (weight.std() / vectors.std().clamp(min=1e-12)))
