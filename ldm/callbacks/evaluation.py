"""Generate once, measure with everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ldm.callbacks.logging import log_samples, samples_seen
from ldm.callbacks.share import first, share, without_trace
from ldm.metrics.metric import Metric
from ldm.pictures import from_bytes, to_bytes
from ldm.types import Batch, Generates


class Evaluation(L.Callback):
    """Generates a picture for each of the first validation samples, and feeds all metrics with it.

    Pictures are rounded as a PNG would be. Values are logged as ``val/<name>`` beside the validation's own,
    so that they can be monitored. Training goes on as if nothing had been measured: random numbers, modes
    and weights are as before. A metric that fails is reported and left out of this evaluation; the others
    and the run go on. Stages that make no pictures are left alone.

    Args:
        metrics: What to measure.
        num_samples: Number of pictures, over all processes. Fréchet distances depend on it.
        every_n_samples: Evaluate at the first validation after each so many training samples, and at the
            end; None evaluates at every validation.
        seed: Seed of the pictures' random numbers.
    """

    def __init__(
        self, metrics: list[Metric], num_samples: int, every_n_samples: int | None = None, seed: int = 0
    ) -> None:
        self.metrics = metrics
        self.num_samples = num_samples
        self.every_n_samples = every_n_samples
        self.seed = seed
        self._next = 0
        self._taken = 0
        self._runs = False
        self._errors: dict[int, str] = {}

    def state_dict(self) -> dict[str, int]:
        """Return when the next evaluation is due."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore when the next evaluation is due."""
        self._next = state_dict["next"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an evaluation if one is due."""
        self._runs = isinstance(pl_module, Generates) and self._is_due(trainer, samples_seen(pl_module))
        self._taken, self._errors = 0, {}
        for metric in self.metrics if self._runs else []:
            metric.reset()
            metric.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate and measure the samples of this batch that are among the first ``num_samples``."""
        missing = share(trainer, self.num_samples) - self._taken
        if not self._runs or missing <= 0 or not isinstance(pl_module, Generates):
            return
        batch = first(batch, missing)
        with without_trace(pl_module):
            images = from_bytes(to_bytes(pl_module.generate(batch, self.seed)))
            for i, metric in enumerate(self.metrics):
                self._attempt(i, metric.update, images, batch)
        self._taken += len(images)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up over processes, compute and log."""
        if not self._runs:
            return
        for i, metric in enumerate(self.metrics):
            for name, value in self._finish(trainer, pl_module, i, metric).items():
                pl_module.log(f"val/{name}", value, batch_size=1, sync_dist=True)
            metric.to("cpu")
            metric.reset()
        log_samples(pl_module)
        self._runs = False

    def _is_due(self, trainer: L.Trainer, seen: int) -> bool:
        if trainer.sanity_checking:
            return False
        if (
            trainer.state.fn != "fit"
            or self.every_n_samples is None
            or trainer.global_step == trainer.max_steps
        ):
            return True
        if seen < self._next:
            return False
        self._next = (seen // self.every_n_samples + 1) * self.every_n_samples
        return True

    def _attempt(self, i: int, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run a step of metric i unless one has failed already, and keep its error."""
        if i in self._errors:
            return None
        try:
            return action(*arguments)
        except Exception as error:
            self._errors[i] = f"{type(error).__name__}: {error}"
            return None

    def _finish(
        self, trainer: L.Trainer, pl_module: L.LightningModule, i: int, metric: Metric
    ) -> dict[str, float]:
        def all_reduce(tensor: Tensor) -> Tensor:
            total = trainer.strategy.reduce(tensor.to(pl_module.device), reduce_op="sum")
            assert isinstance(total, Tensor)
            return total.cpu()

        # processes agree on who failed before they add up: one that stays away would leave the others waiting
        num_failed = int(all_reduce(torch.tensor(float(i in self._errors))))
        values: dict[str, float] = {}
        if not num_failed:
            metric.sync(all_reduce)
            values = self._attempt(i, metric.compute) or {}
        if num_failed or i in self._errors:
            why = self._errors.get(i, f"it failed on {num_failed} other process(es)")
            rank_zero_warn(f"metric {type(metric).__name__} is left out of this evaluation: {why}")
        return values
