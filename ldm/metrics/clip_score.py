"""How well pictures follow their captions, in the eyes of a CLIP."""

from __future__ import annotations

from torch import Tensor

from ldm.metrics.features import ImageText
from ldm.metrics.metric import AllReduce, Mean, Metric
from ldm.types import Batch


class CLIPScore(Metric):
    """Mean of 100 max(cos(image, caption), 0) (Hessel et al. 2021, arXiv:2104.08718, with w = 100).

    Args:
        clip: Image and text tower.
        name: Name of the value.
    """

    def __init__(self, clip: ImageText, name: str = "clip_score") -> None:
        self.clip = clip
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._mean = Mean()

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add generated pictures and the captions ``batch["text"]``.

        Raises:
            ValueError: If the samples have no captions.
        """
        if "text" not in batch:
            raise ValueError(
                f"CLIPScore: the samples have {sorted(batch)}, expected 'text' (captions in the shards)"
            )
        image, text = self.clip.encode_image(images).double(), self.clip.encode_text(batch["text"]).double()
        self._mean.update(100.0 * (image * text.to(image.device)).sum(1).clamp_min(0.0))

    def sync(self, all_reduce: AllReduce) -> None:
        """Add up over processes."""
        self._mean.sync(all_reduce)

    def compute(self) -> dict[str, float]:
        """Return the score in [0, 100]."""
        return self._mean.compute(self.name)
