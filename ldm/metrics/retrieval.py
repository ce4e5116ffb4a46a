"""Whether a picture finds its caption among many, and a caption its picture."""

from __future__ import annotations

import torch
from torch import Tensor


def recall_at_1(image: Tensor, text: Tensor, captions: list[str] | None = None) -> dict[str, float]:
    """Compute R@1 both ways (Radford et al. 2021): how often the nearest of the other kind is the right one.

    Args:
        image: (N, E) unit vectors of pictures.
        text: (N, E) unit vectors of their captions, in the same order.
        captions: The N captions; equal ones are equally right. None takes all for different.

    Returns:
        ``{"image_to_text": x, "text_to_image": y}``, both in [0, 1].

    Raises:
        ValueError: If the two are not equally many.
    """
    if len(image) != len(text):
        raise ValueError(
            f"recall_at_1: got {len(image)} pictures and {len(text)} captions, expected equally many"
        )
    names = captions if captions is not None else [str(i) for i in range(len(text))]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    scene = torch.tensor([number[name] for name in names], device=image.device)
    similarity = image.double() @ text.double().T
    return {
        "image_to_text": _share(scene[similarity.argmax(1)] == scene),
        "text_to_image": _share(scene[similarity.argmax(0)] == scene),
    }


def _share(right: Tensor) -> float:
    return right.double().mean().item()
