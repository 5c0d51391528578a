"""Random views of a batch of images, by kornia: the same code on CPUs and GPUs. Also mixup.

All randomness is torch's own generator's, which checkpoints hold: a resumed run varies images as the other would have.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmkit.errors import BadInput
from lmkit.vision.options import Augment


@cache
def _views(augment: Augment) -> nn.Module:
    """The composed transform for images in 0..1; kornia takes seconds to import, so only when one is asked for."""
    try:
        import kornia.augmentation as K
    except ImportError:
        raise BadInput(
            "augmentation needs kornia: pip install -e '.[vision]', or set every option of augment to 0."
        ) from None
    steps: list[nn.Module] = []
    if augment.rotation or augment.shift:
        shift = (augment.shift, augment.shift) if augment.shift else None
        steps.append(K.RandomAffine(augment.rotation, translate=shift, p=1.0))
    if augment.flip:
        steps.append(K.RandomHorizontalFlip(p=0.5))
    if augment.jitter:
        steps.append(K.ColorJiggle(augment.jitter, augment.jitter, p=1.0))
    if augment.randaug:
        steps.append(K.auto.RandAugment(n=2, m=10))
    if augment.erase:
        steps.append(K.RandomErasing(p=augment.erase))
    return K.AugmentationSequential(*steps, data_keys=["input"])


def random_views(images: Tensor, augment: Augment) -> Tensor:
    """A changed copy of each image; float [B, C, S, S] in 0..255, likewise returned. Places moved in are black."""
    if not any((augment.shift, augment.rotation, augment.flip, augment.jitter, augment.erase, augment.randaug)):
        return images
    # Jitter and RandAugment read colours: grey images are shown to them as three equal channels.
    grey = images.shape[1] == 1
    shown = images.expand(-1, 3, -1, -1) if grey else images
    with torch.autocast(images.device.type, enabled=False):
        changed = _views(augment)(shown / 255) * 255
    return changed[:, :1] if grey else changed


def mixed(images: Tensor, labels: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup: each image with another of the batch, weights l and 1 - l with one l ~ Beta(alpha, alpha) a batch.

    images: [B, ...]; labels: int64 [B]. Returns the mixed images and targets float [B, classes], which sum to 1.
    """
    weight = torch._sample_dirichlet(torch.tensor([[alpha, alpha]], dtype=torch.float64))[0, 0].item()
    other = torch.randperm(len(images)).to(images.device)
    targets = F.one_hot(labels, num_classes).to(images)
    return weight * images + (1 - weight) * images[other], weight * targets + (1 - weight) * targets[other]
