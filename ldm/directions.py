"""Which direction of a metric is better, by its name. Imports no torch, so that ldm.compare needs none."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Literal

End = Literal["min", "max"]

SMALLER_IS_BETTER = ("loss*", "fid/*", "sfid/*", "kid/*", "cmmd/*", "lpips*", "reconstruction", "kl")
LARGER_IS_BETTER = (
    *(
        "psnr",
        "image_psnr*",
        "ssim*",
        "accuracy",
        "clip_score/*",
        "caption/*",
        "layout/*",
        "map/*",
        "known/*",
    ),
    *("is/*", "precision/*", "recall/*", "density/*", "coverage/*"),
    *("image_to_text*", "text_to_image*", "zero_shot*"),
)
"""Values of a validation, without val/."""
GOOD_END: tuple[tuple[tuple[str, ...], End], ...] = ((SMALLER_IS_BETTER, "min"), (LARGER_IS_BETTER, "max"))


def good_end(name: str) -> End | None:
    """Return which end of a metric is better, None if its name does not say.

    Args:
        name: As it is logged, with or without val/.
    """
    bare = name.removeprefix("val/")
    for patterns, end in GOOD_END:
        if any(fnmatch(bare, pattern) for pattern in patterns):
            return end
    return None
