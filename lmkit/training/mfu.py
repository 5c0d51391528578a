"""Model FLOPs utilisation: the share of a device's peak that the model's own arithmetic takes (PaLM, appendix B)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

# Dense bfloat16 FLOP per second as the makers state them, by a part of torch's device name; the first match counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP per second of one device in bfloat16; None for a CPU, or a GPU that the table does not have."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(model: PreTrainedModel, context_length: int) -> float:
    """FLOP of one token's forward and backward: 6 for each weight of a matrix, 12 H D T for attention in each layer.

    The output layer counts, embedding look-ups do not; attention counts T keys a query, as if it were not causal, and
    nothing in a model without heads. A frozen matrix needs no gradient of its own: 4 for each of its weights.
    """
    layers = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    matrices = [p for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2]
    config = model.config
    if not getattr(config, "num_attention_heads", None):
        return float(sum((6 if p.requires_grad else 4) * p.numel() for p in matrices))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * context_length
    return float(sum((6 if p.requires_grad else 4) * p.numel() for p in matrices) + attention)
