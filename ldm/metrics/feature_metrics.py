"""All measures of one network's features, from one pass of each image through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ldm.distributed.group import Group
from ldm.metrics.features import Extractor, FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata, Metric, ReferenceInfo, error_text
from ldm.metrics.reference import FromBatches, FromFile, Reference
from ldm.types import Batch


class FeatureMetrics(Metric):
    """Compares generated with real images in the eyes of one network.

    An image passes the network once for all measures. The real images are those of the batches, unless
    there is a file of statistics; they are looked at in the first evaluation only.

    Args:
        extractor: The network.
        measures: What to compute; a value is called ``<measure>/<name of the extractor>``.
        reference: File of statistics to compare with, .npz with ``mu`` and ``sigma`` or images ``arr_0``;
            None: the real images of the batches.
        max_rows: Measures that need each image's features (KID, precision, ...) take the first so many.
    """

    def __init__(
        self,
        extractor: Extractor,
        measures: Sequence[Measure],
        reference: str | None = None,
        max_rows: int = 50_000,
    ) -> None:
        self.extractor = extractor
        self.measures = list(measures)
        self.max_rows = max_rows
        self.reference: Reference = FromFile(reference) if reference else FromBatches()
        self._needs = reduce(FeatureSpec.__or__, (m.generated for m in self.measures), FeatureSpec())
        self._needs_real = reduce(FeatureSpec.__or__, (m.real for m in self.measures), FeatureSpec())
        if unknown := (self._needs | self._needs_real).views - extractor.views:
            raise ValueError(
                f"measures: need the views {sorted(unknown)} of {type(extractor).__name__}, "
                f"which has {sorted(extractor.views)}"
            )
        self.higher_is_better = {
            f"{name}/{extractor.name}": up for m in self.measures for name, up in m.higher_is_better.items()
        }
        self._by_name: dict[str, Measure] = {}
        self.failures: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all images, but not the real ones of earlier evaluations."""
        self.generated = FeatureSet(self._needs, max_rows=self.max_rows)
        self.real = FeatureSet(self._needs_real, num_splits=2, max_rows=self.max_rows)
        self._knows_real = not self._needs_real.views

    def begin(self, reference: ReferenceInfo, group: Group) -> None:
        """Look for statistics of the real images: in memory, in the cache, or in the file.

        Raises:
            ValueError: If the file cannot be used; on all processes.
        """
        self.reset()
        if self._knows_real:
            return
        found, problem = self._find(reference) if group.rank == 0 else (False, "")
        self._knows_real, problem = group.broadcast((found, problem))
        if problem:
            raise ValueError(problem)

    @property
    def context_length(self) -> int | None:
        """Most tokens of a caption that a measure reads; None if none reads captions."""
        reads = (self._needs | self._needs_real).views & {"text", "agreement"}
        return self.extractor.context_length if reads else None

    @property
    def needs_real(self) -> bool:
        """Whether the real images are not known yet."""
        return not self._knows_real

    def update_real(self, batch: Batch) -> None:
        """Add the real images ``batch["image"]`` unless their statistics are known."""
        if not self._knows_real:
            with torch.no_grad():
                seen = self.extractor.look(batch["image"], batch, self._needs_real.views)
            self.real.add(seen, batch["index"])

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add generated images."""
        self.reference.check(images.shape[-1])
        with torch.no_grad():
            self.generated.add(self.extractor.look(images, batch, self._needs.views), batch["index"])

    def sync(self, group: Group) -> None:
        """Bring everything to the first process, and keep what is known of the real images."""
        self.generated.sync(group)
        if not self._knows_real:
            self.real.sync(group)
            if group.rank == 0:
                self.reference.keep(self.real)

    def compute(self) -> dict[str, float]:
        """Return the values of all measures that do not fail; ``failures`` names the others."""
        self.failures = {}
        if not self.generated.count:
            return {}
        self.generated.device = self.real.device = self._device()
        return {name: value for measure in self.measures for name, value in self._values(measure).items()}

    def metadata(self, name: str) -> Metadata:
        """Name measure, network, reference and numbers of images."""
        measure = self._by_name[name]
        metadata: Metadata = {
            "metric": f"{type(measure).__module__}.{type(measure).__qualname__}",
            **measure.metadata(),
        }
        metadata |= self.extractor.metadata()
        metadata |= {"num": min(self.generated.count, self.max_rows if measure.generated.rows else 2**62)}
        if measure.real.views:
            num = min(self.real.count, self.max_rows if measure.real.rows else 2**62)
            metadata |= {"num_real": num or "unknown", "reference": self.reference.name}
        return metadata

    def _values(self, measure: Measure) -> dict[str, float]:
        try:
            found = measure.compute(self.generated, self.real)
        except Exception as error:  # the others have all that they need
            self.failures[f"{type(measure).__name__} of {self.extractor.name}"] = error_text(error)
            return {}
        values = {f"{name}/{self.extractor.name}": value for name, value in found.items()}
        self._by_name |= dict.fromkeys(values, measure)
        return values

    def _find(self, reference: ReferenceInfo) -> tuple[bool, str]:
        try:
            found = self.reference.find(self.real, self.extractor, reference)
            self.reference.check(reference.size)
            return found, ""
        except Exception as error:  # told to the other processes, which wait for an answer
            return False, f"{error}"

    def _device(self) -> torch.device:
        """Return where measures compute: a GPU if the network is on one; others lack float64."""
        return self.extractor.device if self.extractor.device.type == "cuda" else torch.device("cpu")
