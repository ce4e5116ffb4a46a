"""Contrastive loss of images and captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def contrastive(per_image: Tensor, per_text: Tensor, own: Tensor) -> Tensor:
    """Symmetric cross-entropy of picking the own caption and the own image: Radford et al. 2021, Fig. 3.

    A mean and not a term per sample: a pair is contrasted with the others of its batch.

    Args:
        per_image: Logits of N captions for each of B images, (B, N).
        per_text: Logits of N images for each of B captions, (B, N).
        own: (B,) int64, index of the own caption and image.

    Returns:
        Scalar.
    """
    return (F.cross_entropy(per_image, own) + F.cross_entropy(per_text, own)) / 2.0
