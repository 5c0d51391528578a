"""The classic networks, each a few lines of torch: shapes and parameter counts are those of their sources.

A network is nn.Sequential(body, head): fine-tuning keeps the body and replaces the head. Activations and
initialisation are as published, those that no longer train well included; `resnet18_narrow` is the one to use.

Shapes in comments: channels x height (x width, when it differs). Zhang et al., Dive into Deep Learning (d2l.ai), for
LeNet to ResNet-18.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmkit.errors import BadInput


def softmax_regression(channels: int, size: int, classes: int) -> nn.Sequential:
    """One linear layer on the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))


def mlp(channels: int, size: int, classes: int) -> nn.Sequential:
    """One hidden layer of 256 units."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU())
    return nn.Sequential(body, nn.Linear(256, classes))


def mlp_dropout(channels: int, size: int, classes: int) -> nn.Sequential:
    """Two hidden layers of 256 units, with dropout 0.2 and 0.5 behind them."""
    first = [nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(
        nn.Sequential(*first, nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5)), nn.Linear(256, classes)
    )


def threeconv(channels: int, size: int, classes: int) -> nn.Sequential:
    """Three convolutions of 3 x 3 and two linear layers, for 48 x 48 colour images."""
    body = nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),  # 64 x 24
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),  # 128 x 12
        *(nn.Flatten(), nn.Linear(128 * (size // 4) ** 2, 512), nn.ReLU(), nn.Dropout(0.5)),
    )
    return nn.Sequential(body, nn.Linear(512, classes))


def cifar(channels: int, size: int, classes: int) -> nn.Sequential:
    """Three convolutions of 5 x 5 without activations between them, and two linear layers, for 32 x 32 images."""
    body = nn.Sequential(
        *(nn.Conv2d(channels, 32, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2)),  # 64 x 4
        *(nn.Flatten(), nn.Linear(64 * (size // 8) ** 2, 64)),
    )
    return nn.Sequential(body, nn.Linear(64, classes))


def lenet(channels: int, size: int, classes: int) -> nn.Sequential:
    """LeCun et al. 1998, with sigmoids, for 28 x 28 images."""
    side = (size // 2 - 4) // 2
    body = nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2)),  # 6 x 14
        *(nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2)),  # 16 x 5
        *(nn.Flatten(), nn.Linear(16 * side * side, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid()),
    )
    return nn.Sequential(body, nn.Linear(84, classes))


def bn_lenet(channels: int, size: int, classes: int) -> nn.Sequential:
    """LeNet with batch normalisation (Ioffe and Szegedy 2015) and no padding."""
    side = ((size - 4) // 2 - 4) // 2
    body = nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2)),  # 6 x 12
        *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2)),  # 16 x 4
        *(nn.Flatten(), nn.Linear(16 * side * side, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid()),
    )
    return nn.Sequential(body, nn.Linear(84, classes))


def alexnet(channels: int, size: int, classes: int) -> nn.Sequential:
    """Krizhevsky et al. 2012 on one GPU, for 224 x 224 images."""
    side = ((((size - 9) // 4 + 1) - 3) // 2 - 2) // 2
    side = (side + 1 - 3) // 2 + 1
    body = nn.Sequential(
        *(nn.Conv2d(channels, 96, 11, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),  # 96 x 26
        *(nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),  # 256 x 12
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),  # 256 x 5
        *(nn.Flatten(), nn.Linear(256 * side * side, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5)),
    )
    return nn.Sequential(body, nn.Linear(4096, classes))


def vgg11(channels: int, size: int, classes: int, divide: int = 1) -> nn.Sequential:
    """Simonyan and Zisserman 2014: blocks of 3 x 3 convolutions, each halving the side, for 224 x 224 images."""
    layers: list[nn.Module] = []
    width = channels
    for depth, out in ((1, 64), (1, 128), (2, 256), (2, 512), (2, 512)):
        for _ in range(depth):
            layers += [nn.Conv2d(width, out // divide, 3, padding=1), nn.ReLU()]
            width = out // divide
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(width * (size // 32) ** 2, 4096), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(
        nn.Sequential(*layers, nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5)), nn.Linear(4096, classes)
    )


def vgg11_quarter(channels: int, size: int, classes: int) -> nn.Sequential:
    """VGG-11 with a quarter of the channels."""
    return vgg11(channels, size, classes, divide=4)


def nin(channels: int, size: int, classes: int) -> nn.Sequential:
    """Network in network, Lin et al. 2013: a multilayer perceptron at each pixel, a mean for a head, 224 x 224."""

    def block(width: int, out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
        mix = [nn.Conv2d(out, out, 1), nn.ReLU(), nn.Conv2d(out, out, 1), nn.ReLU()]
        return [nn.Conv2d(width, out, kernel, stride, padding), nn.ReLU(), *mix]

    body = nn.Sequential(
        *(*block(channels, 96, 11, 4, 0), nn.MaxPool2d(3, 2)),
        *(*block(96, 256, 5, 1, 2), nn.MaxPool2d(3, 2)),
        *(*block(256, 384, 3, 1, 1), nn.MaxPool2d(3, 2), nn.Dropout(0.5)),
    )
    return nn.Sequential(body, nn.Sequential(*block(384, classes, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


class Inception(nn.Module):
    """Four paths side by side: 1 x 1; 1 x 1 then 3 x 3; 1 x 1 then 5 x 5; pooling then 1 x 1."""

    def __init__(self, width: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int):
        super().__init__()
        self.one = nn.Conv2d(width, one, 1)
        self.three = nn.Sequential(nn.Conv2d(width, three[0], 1), nn.ReLU(), nn.Conv2d(*three, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(width, five[0], 1), nn.ReLU(), nn.Conv2d(*five, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(width, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1))


def googlenet(channels: int, size: int, classes: int) -> nn.Sequential:
    """Szegedy et al. 2014, without the auxiliary heads, for 96 x 96 images or larger."""
    body = nn.Sequential(
        *(nn.Conv2d(channels, 64, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),  # 64 x 24
        *(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
        Inception(192, 64, (96, 128), (16, 32), 32),
        Inception(256, 128, (128, 192), (32, 96), 64),
        nn.MaxPool2d(3, 2, padding=1),  # 480 x 6
        Inception(480, 192, (96, 208), (16, 48), 64),
        Inception(512, 160, (112, 224), (24, 64), 64),
        Inception(512, 128, (128, 256), (24, 64), 64),
        Inception(512, 112, (144, 288), (32, 64), 64),
        Inception(528, 256, (160, 320), (32, 128), 128),
        nn.MaxPool2d(3, 2, padding=1),  # 832 x 3
        Inception(832, 256, (160, 320), (32, 128), 128),
        Inception(832, 384, (192, 384), (48, 128), 128),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return nn.Sequential(body, nn.Linear(1024, classes))


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a way around them (He et al. 2015), 1 x 1 where the shape changes."""

    def __init__(self, width: int, out: int, stride: int, bias: bool):
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, padding=1, bias=bias)
        self.first_norm, self.second_norm = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=bias)
        self.around = nn.Conv2d(width, out, 1, stride, bias=bias) if stride > 1 or width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.around(x))


def _stages(width: int, bias: bool) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for stage in range(4):
        out, before = width << stage, width << max(stage - 1, 0)
        blocks += [Residual(before, out, 2 if stage else 1, bias), Residual(out, out, 1, bias)]
    return blocks


def resnet18(channels: int, size: int, classes: int) -> nn.Sequential:
    """ResNet-18 as in Dive into Deep Learning, its convolutions with biases; for 96 x 96 images or larger."""
    stem = [nn.Conv2d(channels, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    return nn.Sequential(
        nn.Sequential(*stem, *_stages(64, bias=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(512, classes)
    )


def resnet18_narrow(channels: int, size: int, classes: int) -> nn.Sequential:
    """ResNet-18 of width 16 with a 3 x 3 stem that keeps the side: for images of 8 to 64 pixels."""
    stem = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        nn.Sequential(*stem, *_stages(16, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(128, classes)
    )


def patch_front_end() -> nn.Sequential:
    """Rows of a series of 125 x 128 as patches of 15 x 16, each a vector of 16: [B, 125, 128] -> [B, 1024].

    125 is 8 patches of 15 and 5 rows more, which no patch reads.
    """
    return nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv2d(1, 16, (15, 16), (15, 16), bias=False), nn.Flatten())


NETWORKS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    network.__name__: network
    for network in (
        *(resnet18_narrow, resnet18, threeconv, cifar, lenet, bn_lenet, alexnet, vgg11, vgg11_quarter, nin, googlenet),
        *(softmax_regression, mlp, mlp_dropout),
    )
}


def build_network(name: str, channels: int, size: int, classes: int) -> nn.Sequential:
    """The network of that name; BadInput for a name that is none, or images too small for it."""
    if name not in NETWORKS:
        raise BadInput(f"network {name!r} is not known; wanted one of {', '.join(NETWORKS)}.")
    try:
        network = NETWORKS[name](channels, size, classes)
        with torch.no_grad():
            network.eval()(torch.zeros(1, channels, size, size))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(f"{name} cannot read images of {size} x {size}: {error}. Raise preprocess.size.") from error
    return network.train()
