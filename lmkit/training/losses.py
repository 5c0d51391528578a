"""Cross-entropy of a linear output layer that never holds all the logits, and the module that training calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmkit.errors import BadInput
from lmkit.models.positions import positions_of

# Logits up to this many are computed at once: below it the plain way is faster, above it memory decides.
CHUNK_LOGITS = 2**23


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over counted tokens of -log softmax(logits)[label] + z_loss * logsumexp(logits)^2, and the number of them.

    hidden: [N, D], weight: [V, D], labels: [N] with -100 where a token does not count; logits = hidden @ weight.T, or
    softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118). z_loss keeps the normaliser near 1 (PaLM,
    arXiv:2204.02311, 1e-4 there). Both results are float32 scalars. At most `chunk_logits` logits exist at a time:
    gradients are computed chunk by chunk in the forward (as in Liger Kernel, arXiv:2410.10989), so that the backward
    only scales them. Under autocast the products are in its dtype, sums in float32.

    >>> linear_cross_entropy(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, -100]))
    (tensor(2.7726), tensor(2.))
    """
    count = (labels != -100).sum().float()
    if labels.numel() * weight.shape[0] > chunk_logits:
        rows = max(1, chunk_logits // weight.shape[0])
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, z_loss, softcap), count
    logits = F.linear(hidden, weight).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, labels, reduction="sum")
    if z_loss:
        total = total + z_loss * logits.logsumexp(1)[labels != -100].square().sum()
    return total, count


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, z_loss: float, softcap: float | None):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for first in range(0, len(labels), rows):
            part, targets = hidden[first : first + rows].to(dtype), labels[first : first + rows]
            logits = (part @ matrix.T).float()
            if softcap:
                tanh = logits.div_(softcap).tanh_()
                slope, logits = 1 - tanh.square(), tanh * softcap
            counts = targets != -100
            index = targets.where(counts, 0)[:, None]
            normalizer = logits.logsumexp(1, keepdim=True)
            losses = normalizer - logits.gather(1, index) + z_loss * normalizer.square()
            total += (losses[:, 0] * counts).sum()
            gradient = logits.sub_(normalizer).exp_().mul_(1 + 2 * z_loss * normalizer)
            gradient.scatter_add_(1, index, torch.full_like(gradient[:, :1], -1))
            if softcap:
                gradient.mul_(slope)
            gradient = gradient.mul_(counts[:, None]).to(dtype)
            grad_hidden[first : first + rows] = gradient @ matrix
            grad_weight += gradient.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [(gradient * grad_output).to(gradient.dtype) for gradient in (grad_hidden, grad_weight)]
        return (*scaled, None, None, None, None)


class CausalLMLoss(nn.Module):
    """A language model as the loop trains it: forward(batch) -> (sum of the tokens' losses, number of tokens).

    The logits are never returned: mixed-precision wrappers copy what a forward returns to float32. A cap on the logits
    is the model's own (`final_logit_softcapping`); z_loss is added to each token's loss while training.
    """

    def __init__(self, model: PreTrainedModel, z_loss: float = 0.0):
        super().__init__()
        head = model.get_output_embeddings()
        changed = [k for k in ("logit_scale", "logits_scaling") if getattr(model.config, k, None) not in (None, 1)]
        if getattr(head, "bias", None) is not None or changed:
            raise BadInput(
                f"{type(model).__name__} changes its logits after the output layer ({', '.join(changed) or 'bias'}), "
                "which this loss does not. Start from another model."
            )
        self.model, self.z_loss, self.loss = model, z_loss, linear_cross_entropy
        self.softcap = getattr(model.config, "final_logit_softcapping", None)

    def forward(self, input_ids: Tensor, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids: [B, T]. labels: a token for each hidden state that the backbone returns, [B, T] or as many as the
        objective asks for; labels[b, t] is the token after input_ids[b, t], or -100 where none counts. inputs: others
        that the backbone takes; with document_ids its positions begin again at each document."""
        if (document_ids := inputs.get("document_ids")) is not None:
            inputs["position_ids"] = positions_of(input_ids, 0, None, document_ids)
        # With a cache transformers keeps keys and values during training and drops masks between packed documents.
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        weight, options = self.model.get_output_embeddings().weight, {"z_loss": self.z_loss, "softcap": self.softcap}
        return self.loss(hidden.flatten(0, 1), weight, labels.flatten(), **options)
