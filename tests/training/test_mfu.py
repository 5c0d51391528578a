import pytest
import torch
from transformers import AutoModelForCausalLM

from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.training.mfu import flops_per_token, peak_flops


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_flops_of_a_token_by_hand(arch):
    config = ModelConfig(preset="nano", arch=arch)
    model = AutoModelForCausalLM.from_config(transformers_config(config, 512))
    inside = (2 if arch == "gpt2" else 3) * 64 * 128
    matrices = 2 * (4 * 64 * 64 + inside) + 512 * 64
    assert config.num_matrix_weights(512) == matrices
    assert flops_per_token(model, 100) == 6 * matrices + 12 * 2 * 64 * 100


def test_frozen_matrices_cost_two_thirds():
    model = AutoModelForCausalLM.from_config(transformers_config(ModelConfig(preset="nano"), 512))
    whole = flops_per_token(model, 0)
    assert flops_per_token(model.requires_grad_(False), 0) == whole * 2 / 3


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("?", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
