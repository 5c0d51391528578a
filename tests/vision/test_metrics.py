import pytest
import torch

from lmkit.vision.metrics import classification_report, classification_scores, confusion_matrix, frechet_distance


def test_scores_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="the vision extra is not installed")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    predicted = torch.randint(0, 3, (200,), generator=generator)  # class 3 is never predicted
    confusion = confusion_matrix(predicted, labels, 5)  # class 4 has no samples
    assert confusion[:4, :4].tolist() == metrics.confusion_matrix(labels, predicted).tolist()
    expected = metrics.precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), expected):
        assert classification_scores(confusion)[name].tolist() == pytest.approx(column.tolist())


def test_report_has_a_line_a_class_and_the_accuracy():
    lines = classification_report(torch.tensor([[8, 2], [1, 9]]), ["ants", "bees"]).splitlines()
    assert lines[1].split() == ["ants", "0.8889", "0.8000", "0.8421", "10"]
    assert lines[-1].split() == ["accuracy", "0.8500"]


def test_frechet_distance_of_known_gaussians():
    """Equal means, diagonal covariances: the sum of squared differences of the standard deviations."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    base = base - base.mean(0)
    white = base @ torch.linalg.inv(torch.linalg.cholesky(base.T @ base / 3999).T)
    scaled = white * torch.tensor([2.0, 3.0, 0.5]) + torch.tensor([1.0, 0, 0])
    assert frechet_distance(white, scaled) == pytest.approx(1 + 1 + 4 + 0.25, abs=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg", reason="the vision extra is not installed")
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(60, 5, generator=generator), torch.randn(80, 5, generator=generator) @ torch.randn(5, 5)
    (m, c), (n, d) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (first, second))
    root = linalg.sqrtm((c @ d).numpy()).real
    expected = (m - n).square().sum() + c.trace() + d.trace() - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)
