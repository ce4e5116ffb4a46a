"""Bad samples that others replaced: each is reported once, and all are counted."""

from __future__ import annotations

import warnings
from collections import Counter

from ldm.data.decode import Skipped


class BadSamples:
    """Bad samples that this process has met.

    Args:
        kind: "training" or "validation".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._met = Counter[Skipped]()
        self._new = Counter[str]()

    @property
    def total(self) -> int:
        """How many were replaced; one counts each time that it is met."""
        return self._met.total()

    def note(self, skipped: Skipped) -> None:
        """Count a bad sample, and warn of it when it is met first."""
        if skipped not in self._met:
            warnings.warn(f"bad {self.kind} sample replaced: {skipped.message}", stacklevel=1)
        self._met[skipped] += 1
        self._new[skipped.reason] += 1

    def take(self) -> dict[str, int]:
        """Return by reason how many were replaced since the last call."""
        taken, self._new = dict(self._new), Counter[str]()
        return taken

    def summarize(self) -> None:
        """Warn of all, by their reasons, if there are any."""
        if not self._met:
            return
        of = Counter[str]()
        for skipped, count in self._met.items():
            of[skipped.reason] += count
        reasons = ", ".join(f"{count} {reason}" for reason, count in of.most_common())
        found = f"{self.total} bad {self.kind} samples were replaced ({len(self._met)} different ones)"
        warnings.warn(f"{found}: {reasons}", stacklevel=1)
