"""A signal ends a run between two steps, with everything saved: the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L
import torch
from typing_extensions import override

from ldm.checkpointing.callback import Checkpoints
from ldm.lightning_internals import ignore_sigterm
from ldm.stage_protocols import progress_of
from ldm.types import Batch

EXIT_CODE = 75
"""Exit code of a run that was stopped and may be resumed: EX_TEMPFAIL of sysexits.h, "try again later"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""In order of urgency: stop; stop and, under SLURM, requeue."""


class Preempted(Exception):
    """Training was stopped by a signal and can be resumed.

    Args:
        step: Optimizer steps done.
        by: The signal.
    """

    def __init__(self, step: int, by: signal.Signals) -> None:
        super().__init__(f"stopped at step {step} by {by.name}: the same command resumes")
        self.by = by


class Notice:
    """Remembers that SIGTERM or SIGUSR1 came, and does nothing else about it."""

    def __init__(self) -> None:
        self.urgency = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals for the length of a ``with`` block, and restore their handlers after it.

        One that was blocked before, as ldm.fit does with SIGUSR1 lest it kill a process still importing, is
        heard now if it came meanwhile. After the ``with`` block it is blocked again, and does nothing where
        it would end the process: threads that began meanwhile do not block it.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, handler in before.items():
                is_harmless = number in blocked and handler == signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if is_harmless else handler)

    def listen(self) -> None:
        """Install the handlers of the signals."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.urgency = max(self.urgency, 1 + SIGNALS.index(signal.Signals(number)))


class Preemption(L.Callback):
    """Stops all processes at the same step once one of them got SIGTERM or SIGUSR1, and saves.

    A validation is finished first: a time limit must be announced earlier than one takes.

    Args:
        every_n_steps: Steps between two exchanges of several processes about signals; one process alone
            checks before every step.

    Raises:
        ValueError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"preemption.every_n_steps: got {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self.notice = Notice()
        self._checked_step = -1

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.notice.listen()
        ignore_sigterm(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Before the first batch of a step, stop if a signal came.

        Raises:
            Preempted: On all processes, once everything is saved.
        """
        step = progress_of(pl_module).steps
        if step == self._checked_step or (trainer.world_size > 1 and step % self.every_n_steps):
            return
        self._checked_step = step
        if urgency := self._max_urgency(trainer):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoints):
                    callback.save_new(trainer)
            raise Preempted(step, SIGNALS[urgency - 1])

    def _max_urgency(self, trainer: L.Trainer) -> int:
        if trainer.world_size == 1:
            return self.notice.urgency
        mine = torch.tensor(self.notice.urgency, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))


def requeue(by: signal.Signals) -> None:
    """Have SLURM queue this job again, if it runs under SLURM and was stopped by SIGUSR1.

    After SIGTERM it is not: SLURM sends that after it has queued the job itself, or to cancel it.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or by != signal.SIGUSR1:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # SLURM_JOB_ID is that of the array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"warning: scontrol requeue {job} failed: {reason}", file=sys.stderr, flush=True)
