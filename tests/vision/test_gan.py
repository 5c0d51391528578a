"""Two networks against each other: losses by hand, whose gradient goes where, and drawing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from lmkit.vision.gan import (
    Adversaries,
    discriminator_loss,
    draw,
    fooled,
    generator_loss,
    new_discriminator,
    new_generator,
)
from lmkit.vision.options import Preprocess

PREPROCESS = Preprocess(size=4, channels=1, mean=[0.5], std=[0.5])
PIXELS = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def adversaries():
    torch.manual_seed(1)
    return Adversaries(new_generator(PREPROCESS, 3, 8), new_discriminator(PREPROCESS, 8), PREPROCESS, penalty=0.0)


def test_losses_worked_by_hand():
    """s(ln 3) = 3/4: real at ln 3 costs ln 4/3, drawn at ln 3 costs the discriminator ln 4, the generator ln 4/3."""
    logit = torch.tensor([math.log(3)])
    assert discriminator_loss(logit, logit).item() == pytest.approx(math.log(4 / 3) + math.log(4))
    assert generator_loss(logit).item() == pytest.approx(math.log(4 / 3))
    assert generator_loss(torch.tensor([math.log(3), 0.0])).item() == pytest.approx(math.log(4 / 3) + math.log(2))


def test_each_loss_moves_its_own_network_alone(adversaries):
    torch.manual_seed(2)
    loss, count = adversaries(PIXELS)
    loss.backward()
    assert count == 6
    found = {name: parameter.grad.clone() for name, parameter in adversaries.named_parameters()}
    torch.manual_seed(2)
    real, drawn = PIXELS / 127.5 - 1, adversaries.generator(torch.randn(6, 3))
    judge = adversaries.discriminator
    for_judge = -F.logsigmoid(judge(real)).sum() - F.logsigmoid(-judge(drawn)).sum()
    for_generator = -F.logsigmoid(judge(drawn)).sum()
    torch.testing.assert_close(loss, for_judge + for_generator)
    for part, one_loss in (("discriminator", for_judge), ("generator", for_generator)):
        named = list(getattr(adversaries, part).named_parameters())
        gradients = torch.autograd.grad(one_loss, [p for _, p in named], retain_graph=True)
        for (name, _), gradient in zip(named, gradients):
            torch.testing.assert_close(found[f"{part}.{name}"], gradient)


def test_the_penalty_is_half_the_squared_slope_at_real_images():
    """A discriminator w . x + b has the slope w everywhere."""
    torch.manual_seed(1)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    adversaries = Adversaries(new_generator(PREPROCESS, 3, 8), judge, PREPROCESS, penalty=0.0)
    torch.manual_seed(2)
    without, _ = adversaries(PIXELS)
    adversaries.penalty = 0.3
    torch.manual_seed(2)
    loss, _ = adversaries(PIXELS)
    torch.testing.assert_close(loss - without, 6 * 0.15 * judge[1].weight.square().sum())
    loss.backward()
    assert judge[1].weight.grad.isfinite().all()


def test_drawing_depends_on_the_seed_alone(adversaries):
    drawn = draw(adversaries.generator, 5, seed=3)
    assert (drawn.shape, drawn.dtype) == ((5, 1, 4, 4), torch.uint8)
    torch.manual_seed(99)
    assert torch.equal(draw(adversaries.generator, 5, seed=3, batch_size=2), drawn)
    assert not torch.equal(draw(adversaries.generator, 5, seed=4), drawn)
    adversaries.generator.layers[4].weight.data.zero_()
    adversaries.generator.layers[4].bias.data.copy_(torch.tensor([-9.0, 0.0, 9.0, 0.0] * 4))
    assert draw(adversaries.generator, 1)[0, 0, 0].tolist() == [0, 128, 255, 128]


def test_shares_taken_for_real(adversaries):
    for bias, share in ((5.0, 1), (-5.0, 0)):
        adversaries.discriminator[-1].weight.data.zero_()
        adversaries.discriminator[-1].bias.data.fill_(bias)
        assert fooled(adversaries, PIXELS) == {"real_taken_for_real": share, "drawn_taken_for_real": share}


def test_a_directory_gives_the_generator_back(adversaries, tmp_path):
    adversaries.generator.save_pretrained(tmp_path)
    assert torch.equal(draw(AutoModel.from_pretrained(tmp_path), 4), draw(adversaries.generator, 4))
