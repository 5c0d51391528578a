"""Measures of classifiers and of generated images, on tensors.

Shapes: N samples, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [K, K]: row the label, column the prediction. predicted, labels: int64 [N].

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_scores(confusion: Tensor) -> dict[str, Tensor]:
    """precision, recall, f1 and support of each class, float64 [K], from a confusion matrix [K, K].

    A class never predicted has precision 0, one without samples recall 0 (as scikit-learn's zero_division=0).
    """
    counts = confusion.double()
    hits, support, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    return {
        "precision": hits / predicted.clamp(min=1),
        "recall": hits / support.clamp(min=1),
        "f1": 2 * hits / (support + predicted).clamp(min=1),
        "support": support,
    }


def classification_report(confusion: Tensor, classes: Sequence[str]) -> str:
    """A table for people: each class, their mean, the accuracy."""
    scores = classification_scores(confusion)
    width = max(8, *(len(name) for name in classes))
    lines = [f"{'':{width}}  precision  recall      f1  support"]
    columns = [scores[name].tolist() for name in ("precision", "recall", "f1", "support")]
    for name, precision, recall, f1, support in zip(classes, *columns):
        lines.append(f"{name:{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:7.0f}")
    precision, recall, f1 = (scores[name].mean().item() for name in ("precision", "recall", "f1"))
    total = confusion.sum().item()
    lines.append(f"{'mean':{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {total:7.0f}")
    lines.append(f"{'accuracy':{width}}  {confusion.diag().sum().item() / max(1, total):9.4f}")
    return "\n".join(lines)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of two Gaussians fitted to features [N, D] and [M, D] (Dowson and Landau 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). On the features of a judge of one's own: this is no FID, whose
    features are those of one fixed Inception network.

    >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
    9.0
    """
    means, covariances = zip(*(_moments(features.double()) for features in (first, second)))
    # The trace of the root of C1 C2 is the sum of the roots of its eigenvalues, which are real and not negative.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * roots).item()


def _moments(features):
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)
