"""Whether a run goes on with the data that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.types import RGB8


def check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what the order of samples, and what is seen of them, depends on.

    Args:
        then: What the checkpoint holds: "data", "image" and "seed"; one of ldm 0.1 has no "image".
        now: What is found; "data" may have more names, such as those of a set that was added.

    Raises:
        ValueError: If they differ.
    """
    for name, value in then["data"].items():
        if now["data"].get(name) != value:
            raise ValueError(
                f"data.train: the checkpoint was trained on data with {name} {value!r:.120}, found "
                f"{now['data'].get(name)!r:.120}: restore it, or start a new run"
            )
    if (kind := then.get("image", str(RGB8))) != now["image"]:
        raise ValueError(
            f"data.image: the checkpoint was trained on images of {kind}, found {now['image']}: restore it, "
            "or start a new run"
        )
    if then["seed"] != now["seed"]:
        raise ValueError(
            f"seed_everything: the checkpoint was trained with seed {then['seed']}, found {now['seed']}: "
            "restore the seed, or start a new run"
        )
