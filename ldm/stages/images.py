"""Images that a stage is trained on: their side, channels and bits, which its checkpoints record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ldm.io.checkpoint import saved_kind
from ldm.types import ImageKind


class TakesImages:
    """A stage that knows which images it was trained on."""

    image_size: int | None = None
    """Side of the images trained on; known once training has started."""
    image_kind: ImageKind | None = None
    """Channels and bits of these images; known where networks tell, or once training has started."""
    image_channels: int | None = None
    """Channels that the networks take; None if any."""

    def validate_images(self, kind: ImageKind) -> None:
        """Check that the networks take images of a kind, see ``ldm.stage_protocols.ValidatesImages``."""
        if self.image_channels not in (None, kind.channels):
            raise ValueError(
                f"data.image.channels: got {kind.channels}, but the networks of {type(self).__name__} take "
                f"{self.image_channels}: expected the same, see image_channels of model"
            )

    def follow_images(self, data: object) -> None:
        """Take size and kind from a data module, where it has them."""
        self.image_size = getattr(data, "image_size", self.image_size)
        self.image_kind = getattr(data, "image_kind", self.image_kind)

    def images_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them."""
        kind = None if self.image_kind is None else asdict(self.image_kind)
        return {"image_size": self.image_size, "image": kind}

    def load_images(self, checkpoint: Mapping[str, Any]) -> None:
        """Take what a checkpoint holds of them; those of ldm 0.1 name no kind."""
        self.image_size = checkpoint["image_size"]
        self.image_kind = saved_kind(checkpoint) or self.image_kind
