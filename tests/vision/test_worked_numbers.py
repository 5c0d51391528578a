"""Numbers that the material works out or prints, computed; where it is wrong, what it says and what is right.

Those of whole networks, convolutions and pooling are in test_cnn.py, of diffusion in test_diffusion.py.
"""

import io
import math
import pickle

import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lmkit.vision.cnn import NETWORKS


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------- layers and shapes


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Linear(64 * 24 * 24, 512), 18_874_880),  # printed 3,221,504
        (lambda: nn.Linear(512, 43), 22_059),
        (lambda: nn.Linear(64 * 3 * 32 * 32, 10), 1_966_090),
        (lambda: nn.RNN(10, 20), 640),
        (lambda: nn.LSTM(10, 20), 2_560),
        (lambda: nn.GRU(10, 20), 1_920),
    ],
)
def test_parameters_of_layers(make, expected):
    with torch.device("meta"):
        assert parameters(make()) == expected


def test_evaluation_switches_normalisation_to_running_statistics_and_not_off():
    norm = nn.BatchNorm1d(2, eps=0.0).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    assert norm(torch.tensor([[3.0, 8.0]])).tolist() == [[1.0, 2.0]]
    assert nn.Dropout(0.5).eval()(torch.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("images", [64, 16])
def test_reshaping_channels_makes_more_images(images):
    """Six channels read as two images of three: 64 become 128, the last batch of CIFAR's test, 16, becomes 32."""
    maps = nn.Conv2d(3, 6, 3)(torch.zeros(images, 3, 32, 32))
    assert maps.shape == (images, 6, 30, 30)
    assert maps.reshape(-1, 3, 30, 30).shape == (2 * images, 3, 30, 30)


def test_flattening_the_whole_batch_mixes_its_images():
    """A layer of 196,608 inputs reads 64 images as one; flattening from dimension 1 keeps them apart."""
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    other = images.clone()
    other[3] += 1
    mixed, apart = nn.Linear(48, 2), nn.Linear(12, 2)
    assert not torch.allclose(mixed(images.flatten()), mixed(other.flatten()))
    assert torch.equal(apart(images.flatten(1))[:3], apart(other.flatten(1))[:3])


@pytest.mark.parametrize(("images", "whole", "all_"), [(50_000, 781, 782), (10_000, 156, 157)])
def test_batches_of_64(images, whole, all_):
    assert len(DataLoader(range(images), 64)) == all_
    assert len(DataLoader(range(images), 64, drop_last=True)) == whole
    assert 10_000 - 156 * 64 == 16


def test_the_shorter_edge_is_resized_and_the_other_follows():
    """800 x 534 to 512: both edges change, to 767 x 512 (the material: "only the width")."""
    assert ImageOps.cover(Image.new("L", (800, 534)), (512, 512)).size == (767, 512)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_padding_by_half_of_an_odd_kernel_keeps_the_side(kernel):
    assert F.conv2d(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, kernel, kernel), padding=(kernel - 1) // 2).shape[
        2:
    ] == (
        9,
        9,
    )


def test_the_last_layer_of_vgg_reads_4096_numbers():
    """The material puts Linear(1000, 10) in its place, which cannot read them."""
    with torch.device("meta"):
        network = NETWORKS["vgg11"](1, 224, 10)
    assert network[1].in_features == network[0][-3].out_features == 4096
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nn.Linear(1000, 10)(torch.zeros(1, 4096))


def test_a_whole_module_saved_by_pickle_is_not_loaded_by_default():
    """`torch.load` refuses it since torch 2.6: save the state, as safetensors."""
    file = io.BytesIO()
    torch.save(nn.Linear(1, 1), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
        torch.load(file)


# ------------------------------------------------------------------------------------------ gradients and regressions


def test_a_gradient_and_its_accumulation():
    x = torch.arange(4.0, requires_grad=True)
    for times in (1, 2):
        y = 2 * x @ x
        y.backward()
        assert (y.item(), x.grad.tolist()) == (28, [0, 4 * times, 8 * times, 12 * times])


def test_gradient_descent_on_a_parabola():
    """(x - 1)^2 + 1 from 3 with rate 0.1: after five steps 1 + 2 * 0.8^5."""
    x = 3.0
    for _ in range(5):
        x -= 0.1 * (2 * x - 2)
    assert x == pytest.approx(1.65536)


def test_linear_regression_reaches_half_the_mean_squared_error_of_the_noise():
    """w = [2, -3.4], b = 4.2, noise 0.01. The material's loss has the factor 1/2: 5e-5; nn.MSELoss none: 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=generator)
    y = x @ torch.tensor([2, -3.4]) + 4.2 + 0.01 * torch.randn(1000, generator=generator)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for _ in range(3):
        for rows in torch.randperm(1000, generator=generator).split(10):
            optimizer.zero_grad()
            ((model(x[rows])[:, 0] - y[rows]).square() / 2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight.detach()[0], torch.tensor([2, -3.4]), atol=0.01, rtol=0)
    loss = F.mse_loss(model(x)[:, 0], y).item()
    assert loss / 2 == pytest.approx(5e-5, rel=0.2)
    assert loss == pytest.approx(1e-4, rel=0.2)


def test_weight_decay_where_there_are_ten_times_more_inputs_than_samples():
    generator = torch.Generator().manual_seed(0)
    x, test = torch.randn(20, 200, generator=generator), torch.randn(100, 200, generator=generator)
    target = lambda x: 0.05 + 0.01 * x.sum(1)  # noqa: E731
    y = target(x) + 0.01 * torch.randn(20, generator=generator)
    start = torch.randn(200, generator=generator)
    norms, losses = [], []
    for decay in (0.0, 3.0):
        weight, bias = start.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": decay}, {"params": [bias]}], lr=0.003)
        for _ in range(100):
            for rows in torch.randperm(20, generator=generator).split(5):
                optimizer.zero_grad()
                ((x[rows] @ weight + bias - y[rows]).square() / 2).mean().backward()
                optimizer.step()
        norms.append(weight.norm().item())
        losses.append(F.mse_loss(test @ weight + bias, target(test)).item() / 2)
    assert norms[0] > 10 * norms[1]
    assert losses[0] > 100 * losses[1]


def test_a_softmax_written_as_in_the_formula_overflows():
    logits = torch.tensor([[100.0, 0.0]])
    assert (logits.exp() / logits.exp().sum(1, keepdim=True)).isnan().any()
    torch.testing.assert_close(logits.softmax(1), torch.tensor([[1.0, 0.0]]))


def test_a_mean_divided_by_the_batch_again_is_too_small():
    """Ten classes told apart by chance cost ln 10 = 2.303; the material's loop prints 0.009 of it at batch 256."""
    loss = F.cross_entropy(torch.zeros(256, 10), torch.arange(256) % 10).item()
    assert loss == pytest.approx(math.log(10))
    assert loss / 256 == pytest.approx(0.009, abs=5e-5)


@pytest.mark.parametrize(("p", "allowed"), [(0.0, {1.0}), (1.0, {0.0}), (0.5, {0.0, 2.0})])
def test_dropout_keeps_the_mean(p, allowed):
    torch.manual_seed(0)
    found = F.dropout(torch.ones(10_000), p)
    assert set(found.tolist()) == allowed
    assert found.mean().item() == pytest.approx(0.0 if p == 1 else 1.0, abs=0.05)


def test_the_sigmoid_has_a_minus_in_its_exponent():
    """1 / (1 + e^z), as printed, falls."""
    z = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(1 / (1 + (-z).exp()), z.sigmoid())
    torch.testing.assert_close(1 / (1 + z.exp()), 1 - z.sigmoid())


def test_two_linear_layers_are_one():
    """Where they give zero: input1 = -(w2 w7 + w4 w8 + w6 w9) / (w1 w7 + w3 w8 + w5 w9) input2 (printed without the
    minus and with another denominator)."""
    w1, w2, w3, w4, w5, w6, w7, w8, w9 = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    second = torch.tensor(1.7, dtype=torch.float64)
    first = -(w2 * w7 + w4 * w8 + w6 * w9) / (w1 * w7 + w3 * w8 + w5 * w9) * second
    hidden = torch.stack([w1 * first + w2 * second, w3 * first + w4 * second, w5 * first + w6 * second])
    assert (hidden @ torch.stack([w7, w8, w9])).item() == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------- modules that do not work


def test_a_linear_layer_on_the_data_of_its_weights_cannot_learn():
    weight = nn.Parameter(torch.ones(2, 1))
    assert not (torch.ones(1, 2) @ weight.data).requires_grad
    assert (torch.ones(1, 2) @ weight).requires_grad


def test_modules_are_registered_under_text():
    """A sequence that takes the blocks themselves for keys runs, but has no parameters and no state."""

    class Keyed(nn.Module):
        def __init__(self, *blocks):
            super().__init__()
            for block in blocks:
                self._modules[block] = block

        def forward(self, x):
            for block in self._modules.values():
                x = block(x)
            return x

    network = Keyed(nn.Linear(2, 2), nn.ReLU())
    assert network(torch.zeros(1, 2)).shape == (1, 2)
    with pytest.raises(TypeError):
        network.state_dict()
    with pytest.raises(TypeError):
        list(network.parameters())
