import math

import pytest
import torch
from torch import nn

from lmkit.training import optimizers
from lmkit.training.optimizers import Joined, Muon, build_optimizers, orthogonalize, schedule


def test_muon_is_torch_muon():
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 32), (64, 32), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon(ours, lr=0.1, weight_decay=0.05)
    oracle = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in theirs]
        optimizer.step()
        oracle.step()
        for a, b, start in zip(ours, theirs, before):
            moved = (b - start).norm()
            assert (a - b).norm() < 0.02 * moved  # the iteration is in bfloat16
        for a, b in zip(ours, theirs):
            b.data.copy_(a.data)


def test_matrices_of_a_shape_share_one_iteration(monkeypatch):
    calls, plain = [], optimizers.orthogonalize
    monkeypatch.setattr(optimizers, "orthogonalize", lambda stacked: calls.append(stacked.shape) or plain(stacked))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(32, 64), (64, 32), (64, 32), (16, 16), (64, 32)]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    Muon(parameters, lr=0.1).step()
    assert calls == [(1, 32, 64), (3, 64, 32), (1, 16, 16)]


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 24)).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_muon_leaves_a_parameter_without_gradient_alone():
    used, unused = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([used, unused], lr=0.1)
    used.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(unused, torch.ones(4, 4))
    assert not torch.equal(used, torch.ones(4, 4))


def test_joined_optimizers_step_and_load_as_they_do_apart():
    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        return model, build_optimizers(model, "muon", 0.1, 0.01)

    def go_on(model, optimizers, steps):
        for step in steps:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = 0.1 / (step + 1)
            model(torch.full((3, 4), step + 1.0)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    apart = go_on(*started(), range(4))
    model, optimizers = started()
    joined = Joined(optimizers)
    go_on(model, [joined], range(2))
    saved = joined.state_dict()
    other = Joined(build_optimizers(model, "muon", 0.5, 0.0))
    other.load_state_dict(saved)
    assert torch.equal(go_on(model, [other], range(2, 4)), apart)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def get_output_embeddings(self):
        return self.head


def names(model, parameters):
    return sorted(name for name, p in model.named_parameters() if any(p is q for q in parameters))


@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_the_hidden_matrices_and_only_matrices_decay(tie):
    model = Tied()
    if tie:
        model.head.weight = model.embed.weight
    adamw, muon = build_optimizers(model, "muon", learning_rate=1e-3, weight_decay=0.1)
    assert names(model, muon.param_groups[0]["params"]) == ["hidden.weight"]
    assert muon.param_groups[0]["weight_decay"] == 0.1
    (group,) = adamw.param_groups
    assert group["weight_decay"] == 0.0
    outer = ["embed.weight"] if tie else ["embed.weight", "head.weight"]
    assert names(model, group["params"]) == [*outer, "hidden.bias", "norm.bias", "norm.weight"]


def test_adamw_alone_decays_hidden_matrices_only():
    model = Tied()
    (adamw,) = build_optimizers(model, "adamw_torch_fused", learning_rate=1e-3, weight_decay=0.1)
    decayed, kept = adamw.param_groups
    assert adamw.defaults["fused"]
    assert (names(model, decayed["params"]), decayed["weight_decay"]) == (["hidden.weight"], 0.1)
    assert kept["weight_decay"] == 0.0


def test_wsd_is_flat_between_warmup_and_decay_and_ends_low():
    factors = [schedule("wsd", s, warmup_steps=10, max_steps=100, decay_fraction=0.4) for s in range(100)]
    assert factors[:10] == [(s + 1) / 10 for s in range(10)]
    assert set(factors[10:61]) == {1.0}
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 40)


def test_cosine_and_linear_fall_from_one_to_almost_zero():
    for kind, middle in (("cosine", 0.5), ("linear", 0.5)):
        factors = [schedule(kind, s, warmup_steps=0, max_steps=100) for s in range(101)]
        assert factors[0] == 1
        assert factors[50] == pytest.approx(middle)
        assert factors[100] == pytest.approx(0, abs=1e-12)
    assert schedule("cosine", 25, warmup_steps=0, max_steps=100) == pytest.approx(0.5 + math.sqrt(0.125))
