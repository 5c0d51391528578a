import pytest
import torch
from torch import nn

from lmkit.training.ema import EMA


def test_the_average_is_the_weighted_sum_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(8.0)
    ema = EMA(0.5)
    ema.start(layer)
    layer.weight.data.fill_(0.0)
    ema.update(1)  # d = 2/11: most of the initial weight is let go of
    assert ema.average[0].item() == pytest.approx(8 * 2 / 11)
    ema.update(1000)  # d = 0.5
    assert ema.average[0].item() == pytest.approx(8 / 11)


def test_applied_puts_the_average_in_and_the_weights_back_to_the_bit():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    ema = EMA(0.9)
    ema.start(module)
    averaged = [p.clone() for p in ema.average]
    with torch.no_grad():
        module[0].weight.mul_(1.7)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with ema.applied():
        assert torch.equal(module[0].weight, averaged[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert len(ema.average) == 2  # what is not trained is not averaged
