"""Any metric of torchmetrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torchmetrics
from torch import Tensor
from typing_extensions import override

from ldm.distributed.group import Group
from ldm.io.images import to_bytes
from ldm.metrics.metric import Metadata, Metric
from ldm.types import Batch

RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "[-1,1]": lambda images: images,
    "[0,1]": lambda images: images / 2.0 + 0.5,
    "uint8": to_bytes,
}


class TorchMetric(Metric):
    """A metric of torchmetrics, with the states, the value and the synchronisation that it defines.

    Its states may be float32 and depend on the batches by rounding. Where the order of images matters
    (splits of the inception score), they come process by process. Random numbers are seeded.

    Args:
        metric: The metric; its value is one number.
        name: Name of the value.
        inputs: Arguments of its ``update``: the generated images, alone, with the real ones of the samples,
            or with the captions. A metric of two sets (``update(images, real)``) gets both.
        range: Values of the images that it expects.
    """

    def __init__(
        self,
        metric: torchmetrics.Metric,
        name: str,
        inputs: Literal["images", "images+real", "images+text"] = "images+real",
        range: Literal["[-1,1]", "[0,1]", "uint8"] = "[-1,1]",
    ) -> None:
        self.metric, self.name, self.inputs, self.range = metric, name, inputs, range
        if metric.higher_is_better is not None:
            self.higher_is_better = {name: metric.higher_is_better}
        self._compares_sets = "real" in inspect.signature(metric.update).parameters
        self.reset()

    @override
    def reset(self) -> None:
        self.metric.reset()
        self._computed: Tensor | Exception | None = None

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        images = RANGES[self.range](images)
        with _seeded(images.device):
            if self.inputs == "images+text":
                self.metric.update(images, batch["text"])
            elif self.inputs == "images":
                self.metric.update(images)
            elif self._compares_sets:
                self.metric.update(images, real=False)
                self.metric.update(RANGES[self.range](batch["image"]), real=True)
            else:
                self.metric.update(images, RANGES[self.range](batch["image"]))

    @override
    def sync(self, group: Group) -> None:
        # torchmetrics synchronises in compute, which all processes must therefore call
        if not int(group.all_reduce(torch.tensor(self.metric.update_count))):
            return
        try:
            with _seeded(self.metric.device):
                self._computed = self.metric.compute()
        except Exception as error:  # the same on all processes: the first reports it
            self._computed = error

    @override
    def compute(self) -> dict[str, float]:
        if isinstance(self._computed, Exception):
            raise self._computed
        if self._computed is None:
            return {}
        if not isinstance(self._computed, Tensor) or self._computed.numel() != 1:
            raise ValueError(f"{self.name}: {type(self.metric).__name__} gave no single number")
        return {self.name: float(self._computed)}

    @override
    def metadata(self, name: str) -> Metadata:
        kind = type(self.metric)
        return {
            "metric": f"{kind.__module__}.{kind.__qualname__}",
            "torchmetrics": torchmetrics.__version__,
            "inputs": self.inputs,
            "range": self.range,
        }


@contextmanager
def _seeded(device: torch.device) -> Iterator[Any]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
