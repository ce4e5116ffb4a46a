"""Where a run stands: steps, samples per second, remaining time."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ldm.loggers.media import samples_seen
from ldm.types import Batch

BAR_SECONDS = 0.5
"""Time between two states of a bar."""


class Progress(ProgressBar):
    """Shows step, speed, remaining time and losses: a bar on a terminal, elsewhere a line now and then.

    Args:
        every_n_seconds: Time between two lines where the output is no terminal.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bars: list[tqdm[Any]] = []
        self._shown = self._started = 0.0
        self._first_step = self._num_samples = 0

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a message without tearing the bar."""
        if self._enabled:
            tqdm.write(" ".join(map(str, args)), file=sys.stdout)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar at the step that training begins at."""
        self._started = self._shown = time.monotonic()
        self._first_step, self._num_samples = trainer.global_step, 0
        self._open(str(getattr(pl_module, "name", "training")), _end(trainer), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Advance to the current step."""
        self._num_samples += len(batch["key"]) * trainer.world_size
        if not self._is_time(trainer.global_step == trainer.max_steps):
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        values = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        state = f"{self._num_samples / seconds:.4g} samples/s"
        losses = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self._bars:
            self._move(trainer.global_step, f"{state}, {losses}" if losses else state)
        else:
            self._write_line(trainer, pl_module, seconds, f"{state} | {losses}" if losses else state)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a bar of the validation below."""
        total = sum(b for b in trainer.num_val_batches if b != float("inf"))
        self._open("validation", int(total) or None, 0)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the bar of the validation."""
        total = trainer.num_val_batches[dataloader_idx]
        if self._bars:
            self._move(self._bars[-1].n + 1, "")
        elif self._is_time(False):
            self._say(f"validation: batch {batch_idx + 1} of {total}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar of the validation away."""
        self._close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal to the error message."""
        while self._bars:
            self._close()

    def _open(self, name: str, total: int | None, start: int) -> None:
        if self._enabled and sys.stdout.isatty():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            inner = bool(self._bars)
            bar = tqdm(
                desc=name, total=total, initial=start, file=sys.stdout, leave=not inner, position=int(inner),
                dynamic_ncols=True, smoothing=0, bar_format=form,
            )  # fmt: skip
            self._bars.append(bar)

    def _move(self, n: int, postfix: str) -> None:
        bar = self._bars[-1]
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(n - bar.n)

    def _close(self) -> None:
        if self._bars:
            self._bars.pop().close()

    def _is_time(self, is_last: bool) -> bool:
        """Whether to show something: reading the losses makes the host wait for the GPU."""
        now = time.monotonic()
        pause = BAR_SECONDS if self._bars else self.every_n_seconds
        if self._enabled and (is_last or now - self._shown >= pause):
            self._shown = now
            return True
        return False

    def _write_line(
        self, trainer: L.Trainer, pl_module: L.LightningModule, seconds: float, state: str
    ) -> None:
        step, end = trainer.global_step, _end(trainer)
        where = f"step {step}" if end is None else f"step {step}/{end}"
        done = step - self._first_step
        left = f" | {clock(seconds / done * (end - step))} left" if end is not None and done else ""
        name, seen = getattr(pl_module, "name", "training"), samples_seen(pl_module)
        self._say(f"{name}: {where}, {seen} samples | {clock(seconds)}{left} | {state}")

    def _say(self, line: str) -> None:
        print(line, flush=True)


def clock(seconds: float) -> str:
    """Write a duration as [h:]mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _end(trainer: L.Trainer) -> int | None:
    return trainer.max_steps if trainer.max_steps > 0 else None
