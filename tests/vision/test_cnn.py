"""Networks: parameter counts and shapes of their sources; convolution, pooling and activations worked by hand."""

import pytest
import torch
from torch.nn import functional as F

from lmkit.errors import BadInput
from lmkit.vision.cnn import NETWORKS, build_network, patch_front_end

PARAMETERS = [
    ("threeconv", 3, 48, 10, 9_536_074),
    ("threeconv", 3, 48, 32, 9_547_360),
    ("threeconv", 3, 48, 43, 9_553_003),
    ("cifar", 3, 32, 10, 145_578),
    ("lenet", 1, 28, 10, 61_706),
    ("bn_lenet", 1, 28, 10, 44_878),
    ("alexnet", 1, 224, 10, 46_764_746),
    ("vgg11", 1, 224, 10, 128_806_154),
    ("vgg11_quarter", 1, 224, 10, 43_093_322),
    ("nin", 1, 224, 10, 1_992_166),
    ("googlenet", 1, 96, 10, 5_977_530),
    ("resnet18", 1, 96, 10, 11_178_378),
    ("resnet18_narrow", 1, 28, 10, 700_730),
    ("softmax_regression", 1, 28, 10, 7_850),
    ("mlp", 1, 28, 10, 203_530),
    ("mlp_dropout", 1, 28, 10, 269_322),
]


def outputs(network, channels, size, kinds):
    """Shapes behind every layer of those kinds, for one image; on the meta device, so nothing is computed."""
    shapes = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    network.eval()(torch.zeros(1, channels, size, size, device="meta"))
    return shapes


@pytest.mark.parametrize(("name", "channels", "size", "classes", "expected"), PARAMETERS)
def test_parameters_are_those_of_the_source(name, channels, size, classes, expected):
    with torch.device("meta"):
        network = NETWORKS[name](channels, size, classes)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network.eval()(torch.zeros(2, channels, size, size, device="meta")).shape == (2, classes)


def test_every_network_is_counted():
    assert {name for name, *_ in PARAMETERS} == set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "channels", "size", "expected"),
    [
        ("threeconv", 3, 48, [(32, 48, 48), (64, 48, 48), (64, 24, 24), (128, 24, 24), (128, 12, 12)]),
        ("lenet", 1, 28, [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5)]),
        ("bn_lenet", 1, 28, [(6, 24, 24), (6, 12, 12), (16, 8, 8), (16, 4, 4)]),
        (
            "alexnet",
            1,
            224,
            [(c, s, s) for c, s in zip((96, 96, 256, 256, 384, 384, 256, 256), (54, 26, 26, 12, 12, 12, 12, 5))],
        ),
    ],
)
def test_shapes_behind_each_layer(name, channels, size, expected):
    with torch.device("meta"):
        network = NETWORKS[name](channels, size, 10)
    assert outputs(network, channels, size, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)) == expected


@pytest.mark.parametrize(
    ("name", "size", "pools"),
    [
        ("vgg11", 224, [(64, 112), (128, 56), (256, 28), (512, 14), (512, 7)]),
        ("nin", 224, [(96, 26), (256, 12), (384, 5)]),
        ("googlenet", 96, [(64, 24), (192, 12), (480, 6), (832, 3)]),
    ],
)
def test_shapes_behind_each_pool(name, size, pools):
    with torch.device("meta"):
        network = NETWORKS[name](1, size, 10)
    found = outputs(network, 1, size, torch.nn.MaxPool2d)
    # Inception's own pools keep their side: the halvings are those that change it.
    halved = [(c, h) for (c, h, _), (_, before, _) in zip(found, [(0, size, 0), *found]) if h < before]
    assert halved == pools


def test_resnet18_ends_with_512_channels_of_3():
    with torch.device("meta"):
        network = NETWORKS["resnet18"](1, 96, 10)
    assert network[0][:-2].eval()(torch.zeros(1, 1, 96, 96, device="meta")).shape[1:] == (512, 3, 3)


def test_layers_of_the_three_convolutions():
    """The linear layer has (64 * 24 * 24) * 512 weights = 18,874,880 with its biases where only one pool precedes it;
    the material's 3,221,504 is a slip of multiplication, and the network pools twice."""
    network = NETWORKS["threeconv"](3, 48, 10)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in network.modules() if hasattr(layer, "weight")]
    assert counts == [896, 18_496, 73_856, 9_437_696, 5_130]
    assert sum(p.numel() for p in torch.nn.Linear(64 * 24 * 24, 512).parameters()) == 18_874_880


def test_layers_of_the_cifar_network():
    network = NETWORKS["cifar"](3, 32, 10)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in network.modules() if hasattr(layer, "weight")]
    assert counts == [2_432, 25_632, 51_264, 65_600, 650]


def test_patch_front_end_leaves_the_last_five_rows_unread():
    front = patch_front_end()
    assert sum(p.numel() for p in front.parameters()) == 3_840
    series = torch.randn(2, 125, 128)
    assert front[:2](series).shape == (2, 16, 8, 8)
    cut = series.clone()
    cut[:, 120:] = 0
    assert torch.equal(front(series), front(cut))
    assert front(series).shape == (2, 1024)


KERNEL = [[1, 2, 1], [0, 1, 0], [2, 1, 0]]
SQUARE = [[1, 2, 0, 3, 1], [0, 1, 2, 3, 1], [1, 2, 1, 0, 0], [5, 2, 3, 1, 1], [2, 1, 0, 1, 1]]
OTHER = [[1, 2, 0, 3, 1], [0, 1, 2, 3, 1], [3, 2, 3, 1, 1], [5, 2, 3, 1, 1], [2, 1, 0, 1, 1]]


def convolved(image, **options):
    image, kernel = (torch.tensor(x, dtype=torch.float32)[None, None] for x in (image, KERNEL))
    return F.conv2d(image, kernel, **options)[0, 0].tolist()


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (SQUARE, {"stride": 1}, [[10, 12, 12], [18, 16, 16], [13, 9, 3]]),
        (SQUARE, {"stride": 2}, [[10, 12], [13, 3]]),
        (
            SQUARE,
            {"padding": 1},
            [[1, 3, 4, 10, 8], [5, 10, 12, 12, 6], [7, 18, 16, 16, 8], [11, 13, 9, 3, 4], [14, 13, 9, 7, 4]],
        ),
        (
            OTHER,
            {"padding": 1},
            [[1, 3, 4, 10, 8], [7, 14, 14, 17, 9], [9, 18, 18, 17, 9], [15, 17, 14, 8, 7], [14, 13, 9, 7, 4]],
        ),
    ],
)
def test_a_convolution_worked_by_hand(image, options, expected):
    assert convolved(image, **options) == expected


def test_the_channels_of_a_colour_patch_are_added_up():
    """Products of 1, 5 and -1 in red, green and blue and a bias of 0 are one number, 5."""
    patch = torch.tensor([[[1.0, 2], [0, 1]], [[2, 0], [1, 1]], [[1, 1], [0, 3]]])[None]
    kernel = torch.tensor([[[1.0, 0], [2, 0]], [[2, 1], [0, 1]], [[0, -1], [1, 0]]])[None]
    assert (patch * kernel).sum((0, 2, 3)).tolist() == [1, 5, -1]
    assert F.conv2d(patch, kernel, torch.zeros(1)).tolist() == [[[[5]]]]


def test_pooling_worked_by_hand():
    image = torch.tensor(SQUARE)[None, None]
    assert F.max_pool2d(image, 3).tolist() == [[[[2]]]]
    assert F.max_pool2d(image, 3, ceil_mode=True).tolist() == [[[[2, 3], [5, 1]]]]


def test_activations_worked_by_hand():
    values = torch.tensor([[1, -1.5], [-2.5, 3]])
    assert values.relu().tolist() == [[1, 0], [0, 3]]
    torch.testing.assert_close(values.sigmoid(), torch.tensor([[0.7311, 0.1824], [0.0759, 0.9526]]), atol=5e-5, rtol=0)


def test_an_unknown_network_and_one_too_large_for_its_images_are_refused():
    with pytest.raises(BadInput, match=r"network 'resnet' is not known; wanted one of resnet18_narrow, "):
        build_network("resnet", 3, 32, 10)
    with pytest.raises(BadInput, match=r"vgg11_quarter cannot read images of 8 x 8.* Raise preprocess.size"):
        build_network("vgg11_quarter", 3, 8, 10)
