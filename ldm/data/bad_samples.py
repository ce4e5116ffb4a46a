"""Bad samples: what becomes of them, and how many there are."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm.data.decode import Skipped

ENOUGH = 1000
"""Samples that are read before their share of bad ones counts."""
NAMED = 10_000
"""Different bad samples that are reported and remembered; further ones are counted."""


@dataclass(frozen=True)
class BadSamplePolicy:
    """What becomes of samples that cannot be used, the same in training, validation, encoding and packing.

    Args:
        action: "skip" counts them by reason: the next sample takes the place of one, encoding and packing
            leave it out. "error" ends with the first.
        max_share: Share of bad ones among the samples that a process has read, in [0, 1], above which it ends
            all the same, once it has read 1,000.

    Raises:
        ValueError: If ``max_share`` is no share.
    """

    action: Literal["skip", "error"] = "skip"
    max_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"bad_samples.max_share: got {self.max_share}, expected a share, 0 to 1")


SKIP = BadSamplePolicy()


class TooManyBad(ValueError):
    """The policy does not allow as many bad samples."""


@dataclass
class Tally:
    """Counts samples by a policy.

    Args:
        policy: The policy.
        option: What names it, for messages.
        read: Samples read so far, bad ones included.
        bad: Bad ones of them.
    """

    policy: BadSamplePolicy
    option: str
    read: int = 0
    bad: int = 0

    def count(self, read: int, messages: Sequence[str]) -> None:
        """Count samples.

        Args:
            read: How many, bad ones included.
            messages: What is wrong with each of the bad ones.

        Raises:
            TooManyBad: If the policy does not allow them.
        """
        self.read, self.bad = self.read + read, self.bad + len(messages)
        if messages and self.policy.action == "error":
            several = f"{len(messages)} bad samples, e.g. " if len(messages) > 1 else ""
            raise TooManyBad(f"{self.option}.action is error: {several}{messages[0]:.180}")
        if messages and self.read >= ENOUGH and self.bad > self.policy.max_share * self.read:
            raise TooManyBad(
                f"{self.option}.max_share: {self.bad} of {self.read} samples are bad, expected at most "
                f"{self.policy.max_share:.3g} of them, e.g. {messages[-1]:.150}"
            )


class BadSamples:
    """Bad samples that this process has met: each of the first 10,000 is reported once, and all are counted.

    Args:
        kind: "training" or "validation".
        policy: What becomes of them.
    """

    def __init__(self, kind: str, policy: BadSamplePolicy = SKIP) -> None:
        self.kind, self.policy = kind, policy
        self._tally = Tally(policy, "data.bad_samples")
        self._named: set[Skipped] = set()
        self._reasons, self._new = Counter[str](), Counter[str]()

    @property
    def total(self) -> int:
        """How many were replaced; one counts each time that it is met."""
        return self._reasons.total()

    def note(self, num_good: int, found: Sequence[Skipped]) -> None:
        """Count the samples of a batch and the bad ones that they replace; warn of each that is met first.

        Raises:
            TooManyBad: If the policy does not allow them.
        """
        for skipped in found:
            if skipped not in self._named and len(self._named) < NAMED:
                self._named.add(skipped)
                warnings.warn(f"bad {self.kind} sample replaced: {skipped.message}", stacklevel=1)
                if len(self._named) == NAMED:
                    warnings.warn(f"further bad {self.kind} samples are counted, not named", stacklevel=1)
        self._reasons.update(skipped.reason for skipped in found)
        self._new.update(skipped.reason for skipped in found)
        self._tally.count(num_good + len(found), [skipped.message for skipped in found])

    def take(self) -> dict[str, int]:
        """Return by reason how many were replaced since the last call."""
        taken, self._new = dict(self._new), Counter[str]()
        return taken

    def summarize(self) -> None:
        """Warn of all, by their reasons, if there are any."""
        if not self._reasons:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        least = "at least " if len(self._named) == NAMED else ""
        found = (
            f"{self.total} bad {self.kind} samples were replaced ({least}{len(self._named)} different ones)"
        )
        warnings.warn(f"{found}: {reasons}", stacklevel=1)
