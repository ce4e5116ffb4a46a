"""Schedule of a run's checkpoints, and the ones that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from ldm.checkpointing.monitor import check_monitor, monitored, warn
from ldm.checkpointing.writer import LAST, AtomicCheckpointIO
from ldm.distributed.dtensor import is_sharded
from ldm.io.atomic import link
from ldm.io.checkpoint import saved_progress
from ldm.lightning_internals import dump_checkpoint, set_max_steps, validate
from ldm.loggers.directions import Direction, directions
from ldm.stage_protocols import progress_of
from ldm.types import Batch


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` in the run folder: around validations, at the end, at an error.

    Before a validation, so that whatever ends it costs no step: the run that is resumed begins with it. After
    it, because its figures and measured latents belong to the checkpoint. At an error or Ctrl-C in training
    only if it came between two steps or while the next one was computed: training then continues from there.
    Not if weights are split over processes: a process cannot know whether the others would come to gather
    them.

    ``best.ckpt`` and ``step=....ckpt`` are hard links to what was the last one: they cost no time.
    A checkpoint that cannot be written, e.g. on a full disk, is a warning, and training goes on: the one
    before it is still there. At the end of training it is an error.

    Args:
        monitor: Logged value, e.g. val/loss, whose best checkpoint is kept as best.ckpt; None keeps none.
        mode: Whether the best value is the smallest or the largest; None: as the stage or the metric states.
        keep_every_n_steps: Keep the checkpoint of the first validation after each so many optimizer steps,
            as step=....ckpt; None keeps none.
        keep_newest: How many of the step=....ckpt are kept, older ones are removed; None keeps all.

    A ``monitor`` that a validation did not log is a warning: it may have failed, or not be due.

    Raises:
        ValueError: If ``keep_newest`` is less than 1. When training starts, if nothing states ``monitor`` and
            its direction, and ``mode`` is not given.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Direction | None = None,
        keep_every_n_steps: int | None = None,
        keep_newest: int | None = None,
    ) -> None:
        if keep_newest is not None and keep_newest < 1:
            raise ValueError(f"checkpoints.keep_newest: got {keep_newest}, expected at least 1, or null")
        self.monitor = monitor
        self.mode = mode
        self.keep_every_n_steps = keep_every_n_steps
        self.keep_newest = keep_newest
        self.best: float | None = None
        self._next_kept = keep_every_n_steps or 0
        self._step = self._saved = self._validated = -1
        self._is_due = False
        self._before: tuple[float | None, int] = self.best, self._next_kept

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best": self.best, "next_kept": self._next_kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"] if state_dict.get("monitor") == self.monitor else None
        self._next_kept = state_dict["next_kept"]

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the writer, and that validations come between two steps.

        Raises:
            ValueError: If the writer is not ours: another would write in place. If a validation would come
                between the batches of a step: its checkpoint would lack their gradient.
        """
        if not isinstance(io := trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            raise ValueError(
                f"trainer.plugins: checkpoints are written by {type(io).__name__}, expected "
                "ldm.checkpointing.writer.AtomicCheckpointIO or a subclass"
            )
        self._io = io
        every, batches = trainer.val_check_interval, trainer.accumulate_grad_batches
        if isinstance(every, int) and every % batches:
            raise ValueError(
                f"trainer.val_check_interval: got {every} batches, expected a multiple of the {batches} of a "
                "step, see trainer.accumulate_grad_batches"
            )

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["validation"] = {"is_due": self._is_due, "step": self._validated}

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and (validation := checkpoint.get("validation")) is not None:
            self._is_due, self._validated = validation["is_due"], validation["step"]
        elif trainer.state.fn == "fit":  # of an ldm older than this one, or of a run without this callback
            self._validated = saved_progress(checkpoint).steps

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is not None:
            check_monitor(trainer, self.monitor, self.mode)
        step, self._max_steps = _steps(trainer), trainer.max_steps
        is_end = 0 < self._max_steps <= step
        self._is_due |= is_end and self._validated != step
        self._is_due &= trainer.enable_validation
        if is_end and self._is_due:
            set_max_steps(trainer, step + 1)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the validation that the checkpoint lacks."""
        self._step = self._saved = progress_of(pl_module).steps
        set_max_steps(trainer, self._max_steps)
        if self._is_due:
            validate(trainer, self._step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._step = progress_of(pl_module).steps

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was trained, lest a validation that fails costs it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._is_due = True
            if not self._is_saved(trainer):
                self._before = self.best, self._next_kept
                self.save(trainer)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._is_due, self._validated = False, _steps(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._settle(trainer)
        self._before = self.best, self._next_kept
        names = [name for name, keep in (("best", self._is_best(trainer)), *self._due(trainer)) if keep]
        self.save(trainer, names)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of a run that did not end with a validation, and wait until it is written.

        Raises:
            OSError: If it cannot be written: the end of the run would be lost.
        """
        if not self._is_saved(trainer):
            is_written = self.save(trainer) and self._settle(trainer)
            if not is_written and trainer.is_global_zero:
                raise OSError(f"the end of training cannot be written to '{_path(trainer)}': make room there")

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # saves what was trained since the last checkpoint, unless a step was cut short
        is_new, is_complete = self._step != self._saved, progress_of(pl_module).steps == self._step
        if not trainer.is_global_zero or self._step < 0 or not (is_new or trainer.validating):
            return
        if not is_complete:
            warn(f"stopped while step {self._step + 1} was completed: not saved, '{_path(trainer)}' is older")
            return
        self._is_due = trainer.validating and self._validated != self._step
        where = f"stopped {'in the validation ' if trainer.validating else ''}at step {self._step}"
        if is_new and is_sharded(pl_module):
            warn(f"{where}: not saved, for this process holds a shard of the weights")
            return
        try:
            self._save_alone(trainer, is_new)
        except OSError as error:
            warn(f"{where}: {error}")
        else:
            print(f"{where}: saved {_path(trainer)}", flush=True)

    def _save_alone(self, trainer: L.Trainer, is_new: bool) -> None:
        """Write last.ckpt by the first process alone: others that met no error would not come to save."""
        checkpoint = dump_checkpoint(trainer) if is_new else None
        try:
            self._io.finish()
        except OSError as error:
            if checkpoint is None:
                raise
            warn(str(error))
        if checkpoint is not None:
            trainer.strategy.save_checkpoint(checkpoint, _path(trainer))
            self._io.finish()
            self._saved = self._step

    def save(self, trainer: L.Trainer, names: Sequence[str] = ()) -> bool:
        """Write last.ckpt, or begin to, on all processes; return whether there was no error.

        Between two steps, or after a validation.

        Args:
            trainer: What is saved.
            names: Under which it is kept too.
        """
        self._step, path = _steps(trainer), _path(trainer)
        error = None
        try:
            trainer.save_checkpoint(path, storage_options=lambda: self._keep(path, names))
        except OSError as reason:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait
            error = reason
        self._saved = self._step
        return self._agree(trainer, error)

    def save_new(self, trainer: L.Trainer) -> None:
        """Write last.ckpt if there are steps that it does not hold; before a step, on all processes."""
        if not self._is_saved(trainer):
            self.save(trainer)
            self._settle(trainer)

    def _is_saved(self, trainer: L.Trainer) -> bool:
        return self._settle(trainer) and _steps(trainer) == self._saved

    def _settle(self, trainer: L.Trainer) -> bool:
        """Wait for what is being written, on all processes; return whether there was no error."""
        try:
            self._io.finish()
        except OSError as error:
            return self._agree(trainer, error)
        return self._agree(trainer, None)

    def _agree(self, trainer: L.Trainer, error: OSError | None) -> bool:
        """Let all processes know whether the first one met an error, and take back what was not written."""
        if trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return True
        if error is not None:
            warn(f"step {self._saved}: {error}; training goes on, the earlier checkpoint is as it was")
        self._saved = -1
        self.best, self._next_kept = self._before
        return False

    def _keep(self, last: Path, names: Sequence[str]) -> None:
        try:
            for name in names:
                link(last, last.with_name(f"{name}.ckpt"))
            if self.keep_newest is not None:
                for old in sorted(last.parent.glob("step=*.ckpt"))[: -self.keep_newest]:
                    old.unlink()
        except OSError as error:
            warn(f"{', '.join(names)} cannot be kept: {error}")

    def _is_best(self, trainer: L.Trainer) -> bool:
        value = None if self.monitor is None else monitored(trainer, self.monitor, _steps(trainer))
        if value is None or math.isnan(value):
            return False
        sign = 1.0 if (self.mode or directions(trainer)[str(self.monitor)]) == "min" else -1.0
        is_best = self.best is None or sign * value < sign * self.best
        self.best = value if is_best else self.best
        return is_best

    def _due(self, trainer: L.Trainer) -> list[tuple[str, bool]]:
        step = _steps(trainer)
        if self.keep_every_n_steps is None or step < self._next_kept:
            return []
        self._next_kept = (step // self.keep_every_n_steps + 1) * self.keep_every_n_steps
        return [(f"step={step:08d}", True)]


def _steps(trainer: L.Trainer) -> int:
    return progress_of(trainer.lightning_module).steps


def _path(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / LAST
