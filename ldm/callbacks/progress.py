"""Progress bar of a run: steps, samples per second, remaining time."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from ldm.loggers.steps import read_losses
from ldm.stage_protocols import progress_of
from ldm.types import Batch

BAR_SECONDS = 0.5
"""Time between two states of a bar."""


class ProgressBar(TQDMProgressBar):
    """Shows step, speed, remaining time and losses: a bar on a terminal, elsewhere a line now and then.

    Args:
        every_n_seconds: Time between two lines where the output is no terminal.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    validation_description = "validation"

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds

    @property
    @override
    def is_disabled(self) -> bool:
        return not (self.is_enabled and sys.stdout.isatty())

    @override
    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.total, bar.initial = _end(self.trainer), self._first.steps
        bar.n = bar.last_print_n = self._first.steps
        bar.set_description(_name(self.trainer))
        return bar

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        num_samples = progress_of(pl_module).samples - self._first.samples
        losses = read_losses(getattr(pl_module, "step_losses", []))
        return {"samples/s": float(f"{num_samples / self._seconds:.4g}"), **metrics, **losses}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self._shown = time.monotonic()
        self._first = progress_of(pl_module)
        super().on_train_start()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the bar: it counts the steps of the run."""

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = progress_of(pl_module).steps
        if not self._is_due(step == trainer.max_steps):
            return
        if self.is_disabled:
            self._write_line(trainer, pl_module)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, step - 1)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self.is_disabled and self._is_due(False):
            total = trainer.num_val_batches[dataloader_idx]
            print(f"validation: batch {batch_idx + 1} of {total}", flush=True)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _is_due(self, is_last: bool) -> bool:
        """Whether to show something: reading the losses makes the host wait for the GPU."""
        now = time.monotonic()
        pause = self.every_n_seconds if self.is_disabled else BAR_SECONDS
        if self.is_enabled and (is_last or now - self._shown >= pause):
            self._shown = now
            return True
        return False

    def _write_line(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        progress, end, seconds = progress_of(pl_module), _end(trainer), self._seconds
        where, left, done = f"step {progress.steps}", "", progress.steps - self._first.steps
        if end is not None:
            where += f"/{end}"
            left = f" | {clock(seconds / done * (end - progress.steps))} left" if done else ""
        metrics = self.get_metrics(trainer, pl_module)
        state = [f"{metrics.pop('samples/s'):.4g} samples/s"]
        if metrics:
            values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            state.append(", ".join(values))
        line = f"{_name(trainer)}: {where}, {progress.samples} samples | {clock(seconds)}{left} | "
        print(line + " | ".join(state), flush=True)


def clock(seconds: float) -> str:
    """Write a duration as [h:]mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _end(trainer: L.Trainer) -> int | None:
    return trainer.max_steps if trainer.max_steps > 0 else None


def _name(trainer: L.Trainer) -> str:
    return str(getattr(trainer.lightning_module, "name", "training"))
