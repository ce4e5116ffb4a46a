"""The order in which sets take turns: a pure function of (seed, position), with random access.

In each block of positions every set has exactly its share. Within it the sets take their places one after
another, the smallest first: of a set with c samples in the block, the k-th takes one at random in the k-th of
c parts of the places that are left (stratified sampling). So the count of a set of share f among K sets
differs from f x position by less than K - 1: by less than one for two sets. A fixed pattern would give one of
several ranks always the same set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ldm.data.order import mix, stream

_BLOCK = 1 << 12
"""Least length of a block."""
_UNITS = 1 << 20
"""Parts of the total that weights are rounded to where they cannot be written in fewer."""


def proportions(weights: Mapping[str, float]) -> dict[str, int]:
    """Return weights as integers without a common divisor, and without those that are 0.

    They are exact if their sum has at most 2^20 of their common unit, such as 0.7 and 0.3; others are rounded
    to a millionth of the sum.

    Raises:
        ValueError: If one is negative or not finite, or none is above 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"data.train.{name}.weight: got {weight}, expected a number >= 0")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
    if not exact:
        raise ValueError("data.train: all sets have weight 0, expected one above it")
    unit = math.lcm(*(weight.denominator for weight in exact.values()))
    units = {name: int(weight * unit) for name, weight in exact.items()}
    common, total = math.gcd(*units.values()), sum(units.values())
    if total // common > _UNITS:
        units = {name: max(1, round(Fraction(count * _UNITS, total))) for name, count in units.items()}
        common = math.gcd(*units.values())
    return {name: count // common for name, count in sorted(units.items())}


class Turns:
    """Interleaves sets without end: position to (set, position in the set).

    Args:
        shares: Integers above 0.
        seed: Seed of the order.
    """

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        self.seed = seed
        self.counts = np.array(shares, np.int64) * -(-_BLOCK // sum(shares))
        """Samples of each set in a block."""
        self.ends = np.cumsum(self.counts)
        self._block: tuple[int, np.ndarray] | None = None

    def locate(self, position: int) -> tuple[int, int]:
        """Return the set at a position >= 0, and how many samples of it lie before."""
        if len(self.counts) == 1:
            return 0, position
        block, within = divmod(position, int(self.ends[-1]))
        place = int(self._places(block)[within])
        number = int(np.searchsorted(self.ends, place, side="right"))
        count = int(self.counts[number])
        return number, block * count + place - int(self.ends[number]) + count

    def before(self, position: int) -> list[int]:
        """Return how many samples of each set lie before a position."""
        block, within = divmod(position, int(self.ends[-1]))
        numbers = np.searchsorted(self.ends, self._places(block)[:within], side="right")
        found = block * self.counts + np.bincount(numbers, minlength=len(self.counts))
        return [int(count) for count in found]

    def _places(self, block: int) -> np.ndarray:
        """Return what lies at each position of a block: the samples of the first set are numbered first."""
        if self._block is None or self._block[0] != block:
            order = np.argsort(self._draw(block), kind="stable")
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            self._block = block, places
        return self._block[1]

    def _draw(self, block: int) -> np.ndarray:
        """Draw the set at each position of a block."""
        *smaller, largest = np.argsort(self.counts, kind="stable").tolist()
        free = np.arange(self.ends[-1])
        drawn = np.full(len(free), largest)
        for number in smaller:
            count = int(self.counts[number])
            bounds = np.arange(count + 1) * len(free) // count
            within = stream(count, self.seed, block, number) % np.diff(bounds).astype(np.uint64)
            taken = bounds[:-1] + within.astype(np.int64)
            drawn[free[taken]] = number
            free = np.delete(free, taken)
        return drawn


@dataclass(frozen=True)
class Phase:
    """A part of training with the same weights.

    Args:
        start: Global position of its first sample.
        shares: Set to its weight, see ``proportions``.
        begun: Set to its samples before ``start``.
        turns: The order of the sets, in the order of ``shares``.
    """

    start: int
    shares: dict[str, int]
    begun: dict[str, int]
    turns: Turns

    def counts(self, position: int) -> dict[str, int]:
        """Return the samples of each set before a global position."""
        found = zip(self.shares, self.turns.before(position - self.start), strict=True)
        return self.begun | {name: self.begun.get(name, 0) + count for name, count in found}


class Mixture:
    """Maps a global position to (set, position in the set), in phases of constant weights.

    In a new phase each set continues where it stands.

    Args:
        weights: Set to its weight, at least one above 0.
        seed: Seed of the order.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.seed = seed
        self.phases: list[Phase] = []
        self._begin(0, proportions(weights))

    def locate(self, position: int) -> tuple[str, int]:
        """Return the set at a global position >= 0, and the position in it."""
        phase = self.phases[bisect_right(self.phases, position, key=lambda phase: phase.start) - 1]
        number, within = phase.turns.locate(position - phase.start)
        name = list(phase.shares)[number]
        return name, phase.begun.get(name, 0) + within

    def counts(self, position: int) -> dict[str, int]:
        """Return the samples of each set before a global position."""
        phase = self.phases[bisect_right(self.phases, position, key=lambda phase: phase.start) - 1]
        return phase.counts(position)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return where each phase began, and its weights."""
        return [{"start": phase.start, "weights": dict(phase.shares)} for phase in self.phases]

    def resume(self, state: Sequence[Mapping[str, Any]], position: int, new_phase: bool) -> None:
        """Continue after ``state``, with the weights of this mixture.

        Args:
            state: What ``state_dict`` gave.
            position: Global position of the next sample.
            new_phase: Whether other weights than the last ones begin a new phase.

        Raises:
            ValueError: If there are other weights, and no new phase may begin.
        """
        now, self.phases = self.phases[-1].shares, []
        for phase in state:
            self._begin(phase["start"], dict(sorted(phase["weights"].items())))
        if (then := self.phases[-1].shares) == now:
            return
        if not new_phase:
            raise ValueError(
                f"data.train: the checkpoint mixes sets by weights {_shown(then)}, found {_shown(now)}: "
                "restore them, or begin a new phase with --data.new_phase true"
            )
        self._begin(position, now)

    def _begin(self, start: int, shares: dict[str, int]) -> None:
        begun = self.phases[-1].counts(start) if self.phases else {}
        seed = mix(self.seed, 0x7A2B, start)
        self.phases.append(Phase(start, shares, begun, Turns(list(shares.values()), seed)))


def _shown(shares: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {share}" for name, share in shares.items())
