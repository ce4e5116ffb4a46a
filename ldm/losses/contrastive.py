"""Contrastive loss of images and captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def contrastive(per_image: Tensor, per_text: Tensor, own: Tensor, positives: Tensor) -> Tensor:
    """Symmetric cross-entropy of picking the own caption and the own image: Radford et al. 2021, Fig. 3.

    Where captions are equal, each of their images is a positive of each, with equal weights: Yang et al. 2022
    (UniCL, arXiv:2204.03610). Without equal captions that is Radford et al.'s loss, to the bit.
    A mean and not a term per sample: a pair is contrasted with the others of its batch.

    Args:
        per_image: Logits of N captions for each of B images, (B, N).
        per_text: Logits of N images for each of B captions, (B, N).
        own: (B,) int64, index of the own caption and image.
        positives: (B, N) bool, on the CPU: whether the caption of another pair equals the own one.

    Returns:
        Scalar.
    """
    target = own
    if int(positives.sum()) > len(positives):
        target = (positives / positives.sum(dim=1, keepdim=True)).to(per_image)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2.0
