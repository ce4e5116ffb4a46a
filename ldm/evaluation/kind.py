"""Channels and bits of the images that ``ldm.evaluate`` measures."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.types import RGB8, ImageKind


def image_kind(trained: Mapping[str, ImageKind | None], declared: ImageKind | None) -> ImageKind:
    """Return the declared kind, or else the one that all stages were trained on.

    Args:
        trained: Path of each checkpoint to the kind that it was trained on; None takes RGB of 8 bits.
        declared: --image, or None.

    Raises:
        ValueError: If stages were trained on different kinds, and none is declared.
    """
    kinds = {path: kind or RGB8 for path, kind in trained.items()}
    if declared is None and len({str(kind) for kind in kinds.values()}) > 1:
        listed = ", ".join(f"{path} {kind}" for path, kind in kinds.items())
        raise ValueError(f"--image: got none, but checkpoints were trained on different images: {listed}")
    return declared or next(iter(kinds.values()), RGB8)
