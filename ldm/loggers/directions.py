"""Directions of metrics: whether higher values are better, as stated by the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

import lightning as L

Direction = Literal["min", "max"]
Directions = Callable[[], Mapping[str, Direction]]
"""Looks up the directions of a run whose stage and callbacks are not known yet."""


@runtime_checkable
class HasDirections(Protocol):
    """A stage or a callback that states the directions of the values it logs."""

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Names without ``val/``; absent if neither direction is better."""
        ...


def directions(trainer: L.Trainer) -> dict[str, Direction]:
    """Return the better direction of each validation value of a run, by the name it is logged under."""
    found: dict[str, Direction] = {}
    for source in (trainer.lightning_module, *trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(source, HasDirections):
            found |= {f"val/{name}": "max" if up else "min" for name, up in source.higher_is_better.items()}
    return found


def no_directions() -> Mapping[str, Direction]:
    """Return none: nothing is validated."""
    return {}
