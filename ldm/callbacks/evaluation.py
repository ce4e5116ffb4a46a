"""Generate once, measure with everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from ldm.callbacks.ema import EMA
from ldm.callbacks.validation_subset import ValidationSubset
from ldm.distributed.group import default_group
from ldm.evaluation.isolation import replaced, without_trace
from ldm.evaluation.record import append_lines, describe_sampling
from ldm.evaluation.session import Measurement, Value
from ldm.io.images import check_finite, rounded
from ldm.lightning_internals import forward_context
from ldm.loggers.media import log_records, log_samples, samples_seen
from ldm.metrics.metric import Metadata, Metric, ReferenceInfo
from ldm.stage_protocols import progress_of
from ldm.types import RGB8, Batch, Generates


@runtime_checkable
class Identified(Protocol):
    """Real images with an identity, under which their statistics are cached."""

    def identity(self, num: int) -> str:
        """Return text that changes when the first ``num`` of them do."""
        ...

    def fingerprint(self, num: int) -> str:
        """Return what records call them."""
        ...


Component = Callable[..., Any]
"""A sampler or a guidance: what the stage draws with."""


class Evaluation(ValidationSubset):
    """Generates an image for each of the first validation samples, and feeds all metrics with it.

    Images are drawn with the averaged weights if there are any, in the trainer's precision, and rounded as
    a PNG would be; metrics measure in float32. Values are logged as ``val/<name>`` with the validation's
    own, so that they can be monitored, and each is written with its record to ``evaluations.jsonl`` in the
    run folder. Training goes on as if nothing had been measured: random numbers, modes and weights are as
    before.
    A metric or measure that fails is reported and left out of this evaluation; the others and the run go on,
    also if images cannot be drawn. Stages that make no images are left alone.

    Args:
        metrics: What to measure.
        num_samples: Number of images, over all processes. Fréchet distances depend on it.
        every_n_steps: Evaluate at the first validation after each so many optimizer steps, and at the
            end; None evaluates at every validation.
        seed: Seed of the images' random numbers.
        sampler: Sampler that draws the images; None takes the stage's.
        guidance: How conditional and unconditional predictions are combined; None takes the stage's.
        cache: Folder for statistics of the real images, which other runs may share; None means
            ``statistics`` in the run folder.
        name: What tells this evaluation from another one of the run, with other settings: its values are
            then called ``val/<value>@<name>``.
    """

    def __init__(  # one argument more than usual: that it has a twin is not a matter of its settings
        self,
        metrics: list[Metric],
        num_samples: int,
        every_n_steps: int | None = None,
        seed: int = 0,
        sampler: Component | None = None,
        guidance: Component | None = None,
        cache: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_samples)
        self.metrics = metrics
        self.every_n_steps = every_n_steps
        self.seed = seed
        given = {"sampler": sampler, "guidance": guidance}
        self.overrides = {name: component for name, component in given.items() if component is not None}
        self.cache = cache
        self.name = name
        self._next = 0
        self._measurement: Measurement

    @property
    @override
    def state_key(self) -> str:  # several in one run must differ
        return type(self).__qualname__ + self._suffix

    @property
    def _suffix(self) -> str:
        return f"@{self.name}" if self.name else ""

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Direction of every logged value that has one, by its name without ``val/``."""
        stated = (item for metric in self.metrics for item in metric.higher_is_better.items())
        return {f"{name}{self._suffix}": up for name, up in stated}

    @override
    def state_dict(self) -> dict[str, int]:
        return {"next_step": self._next}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._next = state_dict["next_step"]

    def fits(self, pl_module: L.LightningModule) -> bool:
        """Return whether a stage has what is to be measured."""
        return isinstance(pl_module, Generates)

    def images(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        """Return the images to measure, (B, 3, H, W) in [-1, 1], one for each sample."""
        assert isinstance(pl_module, Generates)
        with replaced(pl_module, self.overrides), forward_context(trainer):
            return pl_module.generate(batch, self.seed)

    def metadata(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metadata:
        """Describe how the images are made, for the records."""
        with replaced(pl_module, self.overrides):
            sampling = describe_sampling(pl_module)
        return {"precision": str(trainer.precision), "seed": self.seed, **sampling}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the stage draws with what is to be replaced.

        Raises:
            ValueError: If it has no sampler or no guidance.
        """
        if lacking := [name for name in self.overrides if not hasattr(pl_module, name)]:
            raise ValueError(
                f"Evaluation: got a {' and a '.join(lacking)}, but {type(pl_module).__name__} draws with none"
            )

    @override
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        if not self.fits(pl_module) or not self._is_due(trainer, progress_of(pl_module).steps):
            return False
        for component in self.overrides.values():
            if isinstance(component, nn.Module):  # a guidance may hold a network of its own
                component.to(pl_module.device).eval()
        self._measurement = Measurement(self.metrics, default_group(pl_module.device), pl_module.device)
        self._measurement.begin(self._reference(trainer, pl_module))
        return True

    @override
    def add(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> None:
        images = self.images(trainer, pl_module, batch)
        check_finite(images, batch["key"])
        self._measurement.update_real(batch)
        kind = getattr(pl_module, "image_kind", None) or RGB8
        self._measurement.update(rounded(images, kind.bits), batch)

    @override
    def fail(self, error: Exception) -> None:
        self._measurement.fail(error)

    @override
    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with without_trace(pl_module):
            values = self._measurement.finish()
        for value in values:
            pl_module.log(f"val/{value.name}{self._suffix}", value.value, batch_size=1, sync_dist=True)
        log_samples(pl_module)
        for failure in self._measurement.failures:
            rank_zero_warn(failure)
        if trainer.is_global_zero:
            self._record(trainer, pl_module, values, self._measurement.failures)
        if every := self.every_n_steps:
            self._next = (progress_of(pl_module).steps // every + 1) * every

    def _record(
        self, trainer: L.Trainer, pl_module: L.LightningModule, values: list[Value], failures: list[str]
    ) -> None:
        metadata = self._weights(trainer, pl_module) | _chosen(trainer) | self.metadata(trainer, pl_module)
        lines = [value.record(metadata) for value in values]
        log_records(trainer, {f"val/{v.name}{self._suffix}": {**v.metadata, **metadata} for v in values})
        lines = [{**line, "name": f"val/{line['name']}{self._suffix}"} for line in lines]
        lines += [{"failed": failure, **metadata} for failure in failures]
        path = Path(trainer.default_root_dir) / "evaluations.jsonl"
        try:
            append_lines(path, {"samples": samples_seen(pl_module), "evaluation": self.state_key}, lines)
        except OSError as error:  # a full disk
            rank_zero_warn(f"records of this evaluation are not in {path}: {error}")

    def _weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metadata:
        averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        return {
            "stage": str(getattr(pl_module, "name", type(pl_module).__name__)),
            "samples": samples_seen(pl_module),
            "weights": "ema" if averaged else "raw",
        }

    def _reference(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ReferenceInfo:
        """Identify the real images; an incomplete validation set has no identity."""
        size = getattr(pl_module, "image_size", None)
        real = getattr(trainer.datamodule, "evaluation", None)  # type: ignore[attr-defined]
        if not isinstance(real, Identified) or trainer.limit_val_batches != 1.0:
            return ReferenceInfo(size=size)
        cache, num = Path(self.cache or Path(trainer.default_root_dir) / "statistics"), self.num_samples
        return ReferenceInfo(real.identity(num), cache, size, real.fingerprint(num))

    def _is_due(self, trainer: L.Trainer, steps: int) -> bool:
        is_last = trainer.state.fn != "fit" or steps == trainer.max_steps
        return is_last or self.every_n_steps is None or steps >= self._next


def _chosen(trainer: L.Trainer) -> Metadata:
    """Name the filter of the validation samples, if there is one."""
    kept = getattr(getattr(trainer.datamodule, "evaluation", None), "filter", None)  # type: ignore[attr-defined]
    return {} if kept is None else {"filter": str(kept)}
