"""What of an image a sample shows: one geometry for all that lies on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """Size, crop and flip of an image and of what lies on it, and the bits that choose among captions.

    Args:
        height: H of the image once it is cropped and resized, in pixels.
        width: W of it.
        flip: Whether left and right are exchanged, after the crop.
        crop: Where the crop lies in the image, down and across, in [0, 1): 0 is top or left, almost 1 bottom
            or right; None is the centre.
        draw: 63 random bits that choose among several captions (training); None takes the canonical caption
            (evaluation).
    """

    height: int
    width: int
    flip: bool = False
    crop: tuple[float, float] | None = None
    draw: int | None = None

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the crop of an image of ``height`` x ``width`` pixels.

        The crop is the largest one with the proportions of the view, rounded to full pixels.
        """
        if height * self.width >= width * self.height:
            high, wide = min(height, max(1, round(width * self.height / self.width))), width
        else:
            high, wide = height, min(width, max(1, round(height * self.width / self.height)))
        if self.crop is None:
            return (height - high) // 2, (width - wide) // 2, high, wide
        down, across = self.crop
        return int((height - high + 1) * down), int((width - wide + 1) * across), high, wide
