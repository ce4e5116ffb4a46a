"""Whether a run goes on with the data that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what the order of samples depends on.

    Args:
        then: What the checkpoint holds.
        now: What is found; more names are allowed, such as those of a set that was added.

    Raises:
        ValueError: If they differ.
    """
    for name, value in then.items():
        if now.get(name) != value:
            raise ValueError(
                f"data.train: the checkpoint was trained on data with {name} {value!r:.120}, found "
                f"{now.get(name)!r:.120}: restore it, or start a new run"
            )
