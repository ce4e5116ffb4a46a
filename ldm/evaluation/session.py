"""One evaluation: all metrics over the same images, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.distributed.group import Group
from ldm.metrics.metric import Metadata, Metric, ReferenceInfo, error_text
from ldm.metrics.precision import full_precision
from ldm.types import Batch


@dataclass(frozen=True)
class Value:
    """A number and how it came about.

    Args:
        name: Its name.
        value: The number.
        metadata: Its record.
    """

    name: str
    value: float
    metadata: Metadata

    def record(self, sampling: Metadata) -> dict[str, object]:
        """Return it as a line of a file, with what holds for all values of an evaluation."""
        return {"name": self.name, "value": self.value, **self.metadata, **sampling}


class Measurement:
    """Feeds metrics with the images of one evaluation.

    A failure is left out, on all processes, and named in ``failures``: a metric, or one of the measures of a
    metric that has several. The others go on.

    Args:
        metrics: The metrics.
        group: The processes among which the images are distributed.
        device: Where the images are.
    """

    def __init__(self, metrics: Sequence[Metric], group: Group, device: torch.device) -> None:
        self.metrics = list(metrics)
        self.group = group
        self.device = device
        self.failures: list[str] = []
        self.count = 0
        self._errors: dict[int, str] = {}

    def begin(self, reals: ReferenceInfo) -> None:
        """Move the networks to the device, and begin."""
        for i, metric in enumerate(self.metrics):
            self._attempt(i, metric.to, self.device)
            with full_precision(self.device):
                self._begin(i, metric, reals)

    @property
    def needs_real(self) -> bool:
        """Whether a metric lacks the real images."""
        return any(metric.needs_real for metric in self.metrics)

    @property
    def is_alive(self) -> bool:
        """Whether a metric is left, on this process, that has not failed."""
        return len(self._errors) < len(self.metrics)

    def update_real(self, batch: Batch) -> None:
        """Update metrics with the real images of ``batch``, each of them once in an evaluation."""
        with full_precision(self.device), torch.no_grad():
            for i, metric in enumerate(self.metrics):
                self._attempt(i, metric.update_real, batch)

    def update(self, images: Tensor, batch: Batch) -> None:
        """Measure images (B, 3, H, W) in [-1, 1], on the levels of a file, drawn for ``batch``."""
        self.count += len(images)
        with full_precision(self.device), torch.no_grad():
            for i, metric in enumerate(self.metrics):
                self._attempt(i, metric.update, images, batch)

    def fail(self, error: Exception) -> None:
        """Leave all metrics out of this evaluation: there is an image that they cannot get."""
        for i in range(len(self.metrics)):
            self._errors.setdefault(i, f"an image could not be drawn: {error_text(error)}")

    def compute(self) -> list[Value]:
        """Return all values, the same on each process."""
        count = int(self.group.all_reduce(torch.tensor(self.count)))
        return [value for i, metric in enumerate(self.metrics) for value in self._finish(i, metric, count)]

    def end(self) -> None:
        """Forget the images and leave the device."""
        for metric in self.metrics:
            metric.to("cpu")
            metric.reset()

    def finish(self) -> list[Value]:
        """Compute all values, and end."""
        values = self.compute()
        self.end()
        return values

    def _begin(self, i: int, metric: Metric, reals: ReferenceInfo) -> None:
        """Begin on all processes or on none: they talk to each other in it."""
        if int(self.group.all_reduce(torch.tensor(float(i in self._errors)))) == 0:
            self._attempt(i, metric.begin, reals, self.group)
        else:
            self._errors.setdefault(i, "")  # on another process, which knows why

    def _finish(self, i: int, metric: Metric, count: int) -> list[Value]:
        # processes agree on who failed before they add up: one that stays away would leave the others waiting
        failed = self._failed(i)
        values: list[Value] = []
        if not failed:
            self._sync(i, metric)
            values = (self._attempt(i, self._compute, metric, count) or []) if self.group.rank == 0 else []
        partly = {} if failed else dict(metric.failures)
        values, why, partly = self.group.broadcast((values, failed or self._errors.get(i), partly))
        for name, reason in partly.items():
            self.failures.append(f"measure {name} is left out of this evaluation: {reason}")
        if why:
            self.failures.append(f"metric {type(metric).__name__} is left out of this evaluation: {why}")
        return values

    def _failed(self, i: int) -> str:
        """Return whether metric i failed anywhere; the first process learns why."""
        num_failed = int(self.group.all_reduce(torch.tensor(float(i in self._errors))))
        if not num_failed:
            return ""
        mine = f"{self._errors[i]}\n" if self._errors.get(i) else ""
        gathered = self.group.gather(torch.tensor(list(mine.encode()), dtype=torch.uint8))
        reasons = "; ".join(dict.fromkeys(bytes(gathered.tolist()).decode().splitlines()))
        return reasons + (
            f" (on {num_failed} of {self.group.world} processes)" if self.group.world > 1 else ""
        )

    def _sync(self, i: int, metric: Metric) -> None:
        if self.group.world == 1:
            self._attempt(i, metric.sync, self.group)
        else:
            metric.sync(self.group)  # an error must end this process: the others wait for its numbers

    def _compute(self, metric: Metric, count: int) -> list[Value]:
        found = metric.compute()
        return [Value(name, value, {"num": count, **metric.metadata(name)}) for name, value in found.items()]

    def _attempt(self, i: int, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run a step of metric i unless one has failed already, and keep its error."""
        if i in self._errors:
            return None
        try:
            return action(*arguments)
        except Exception as error:
            self._errors[i] = error_text(error)
            return None
