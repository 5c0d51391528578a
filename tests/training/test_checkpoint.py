import json

import pytest
import torch
from torch import nn

from lmkit.errors import CorruptInput
from lmkit.stage import latest_checkpoint, verify
from lmkit.training import checkpoint
from lmkit.training.optimizers import build_optimizers


def small_model():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8, bias=False))
    model[3].weight = model[0].weight
    return model


def update(model, optimizers, seed):
    torch.manual_seed(seed)
    model(torch.randint(0, 8, (5,))).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_model_and_optimizers_go_on_exactly(tmp_path, optim):
    torch.manual_seed(0)
    model = small_model()
    optimizers = build_optimizers(model, optim, 0.1, 0.1)
    for seed in range(3):
        update(model, optimizers, seed)
    tensors = {
        "model": checkpoint.model_tensors(model),
        "optimizer": checkpoint.optimizer_tensors(model, optimizers),
    }
    checkpoint.save(tmp_path / "step-1", tensors=tensors, state={"step": 3})

    again = small_model()
    fresh = build_optimizers(again, optim, 0.02, 0.3)
    loaded, state = checkpoint.load(tmp_path / "step-1")
    checkpoint.load_model(again, loaded["model"])
    checkpoint.load_optimizers(again, fresh, loaded["optimizer"])
    assert state == {"step": 3}
    assert fresh[0].param_groups[0]["lr"] == 0.02  # settings are the configuration's, not the checkpoint's
    for ours, theirs in zip(fresh, optimizers):
        for group, wanted in zip(ours.param_groups, theirs.param_groups):
            group.update({k: v for k, v in wanted.items() if k != "params"})
    for seed in range(3, 5):
        update(model, optimizers, seed)
        update(again, fresh, seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = small_model()
    checkpoint.save(tmp_path / "c", tensors={"model": checkpoint.model_tensors(model)}, state={})
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 900
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded["model"]["0.weight"], loaded["model"]["3.weight"])


def test_a_checkpoint_is_sealed_and_holds_no_pickle(tmp_path):
    checkpoint.save(tmp_path / "step-000001", tensors={"random": checkpoint.random_tensors()}, state={"kl_coef": 0.1})
    assert sorted(p.name for p in (tmp_path / "step-000001").iterdir()) == [
        "MANIFEST.json",
        "random.safetensors",
        "state.json",
    ]
    verify(tmp_path / "step-000001")
    (tmp_path / "step-000001" / "state.json").write_text(json.dumps({"kl_coef": 0.2}))
    with pytest.raises(CorruptInput):
        verify(tmp_path / "step-000001")
    assert latest_checkpoint(tmp_path) is None


def test_generators_go_on_where_they_were(tmp_path):
    own = torch.Generator().manual_seed(7)
    own.get_state()
    torch.rand(3)
    torch.rand(3, generator=own)
    tensors = {"random": {**checkpoint.random_tensors(), "rollout": own.get_state()}}
    checkpoint.save(tmp_path / "c", tensors=tensors, state={})
    expected = torch.rand(3), torch.rand(3, generator=own)
    loaded, _ = checkpoint.load(tmp_path / "c")
    checkpoint.load_random(loaded["random"], rank=0)
    again = torch.Generator()
    again.set_state(loaded["random"]["rollout"])
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(torch.rand(3, generator=again), expected[1])
