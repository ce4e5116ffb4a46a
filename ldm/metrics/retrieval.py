"""Retrieval of captions by images, and of images by captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata

BLOCK = 4096
"""Rows of a matrix of similarities held at once."""


class Retrieval(Measure):
    """R@k in either direction (Radford et al. 2021, sec. 3.1): how often one of the k nearest is right.

    For generated images it measures how well captions distinguish them; for real ones, how good
    the CLIP is. Among more images it is harder: compare values of equal number only.

    Args:
        ks: Values of k.
    """

    generated = FeatureSpec(rows=frozenset({"embedding", "text", "caption"}))

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.ks = tuple(ks)
        self.higher_is_better = {f"{way}@{k}": True for k in ks for way in ("image_to_text", "text_to_image")}

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``image_to_text@k`` and ``text_to_image@k``, in [0, 1]."""
        image, text, scene = (generated.rows(view) for view in ("embedding", "text", "caption"))
        return {f"{way}@{k}": value for k in self.ks for way, value in recall(image, text, scene, k).items()}

    def metadata(self) -> Metadata:
        """Name the numbers."""
        return {"ks": ", ".join(map(str, self.ks))}


def recall_at_1(image: Tensor, text: Tensor, captions: list[str] | None = None) -> dict[str, float]:
    """Compute R@1 in either direction.

    Args:
        image: (N, E) unit vectors of images.
        text: (N, E) unit vectors of their captions, in the same order.
        captions: The N captions; equal ones are equally right. None takes all for different.

    Returns:
        ``{"image_to_text": x, "text_to_image": y}``, both in [0, 1].

    Raises:
        ValueError: If the two are not equally many.
    """
    if len(image) != len(text):
        raise ValueError(
            f"recall_at_1: got {len(image)} images and {len(text)} captions, expected equally many"
        )
    names = captions if captions is not None else [str(i) for i in range(len(text))]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    scene = torch.tensor([number[name] for name in names], device=image.device)
    return recall(image, text, scene, 1)


def recall(image: Tensor, text: Tensor, scene: Tensor, k: int) -> dict[str, float]:
    """Compute R@k in either direction.

    Args:
        image: (N, E) unit vectors of images.
        text: (N, E) unit vectors of their captions, in the same order.
        scene: (N,) numbers; equal ones are equally right.
        k: Number of nearest neighbours; at most all.
    """
    return {
        "image_to_text": _recall(image, text, scene, k),
        "text_to_image": _recall(text, image, scene, k),
    }


def _recall(queries: Tensor, others: Tensor, scene: Tensor, k: int) -> float:
    found = 0
    for block, right in zip(queries.split(BLOCK), scene.split(BLOCK), strict=True):
        nearest = (block.double() @ others.double().T).topk(min(k, len(others)), dim=1).indices
        found += int((scene[nearest] == right[:, None]).any(1).sum())
    return found / len(queries)
