"""Runs that have nothing left to train: all steps are done, or an EarlyStopping ended them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override

from ldm.io.checkpoint import Checkpoint, saved_progress

STOPPED = "stopped"
"""Key of a checkpoint: the EarlyStopping that ended the run, its monitored value and its reason."""


class Finished(Exception):
    """There is nothing left to train."""


def check_steps(name: str, start: Checkpoint, steps: int, validates: bool) -> None:
    """Check that there are steps left.

    Args:
        name: Of the run.
        start: What it would be resumed from.
        steps: All of its optimizer steps; -1 for no end.
        validates: Whether a run ends with a validation.

    Raises:
        Finished: If not.
    """
    done = start.progress.steps
    if 0 < steps <= done and (start.is_validated or not validates):
        raise Finished(
            f"{name}: finished, {done} of {steps} steps are done; the weights are in {start.file} (raise "
            "--trainer.max_steps to train further)"
        )


def check_stopped(name: str, file: Path, state: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Check that no EarlyStopping has ended a run before that waits for the same now.

    Args:
        name: Of the run.
        file: What it would be resumed from.
        state: Its contents.
        trainer: Would resume it.

    Raises:
        Finished: If one has.
    """
    for callback in early_stopping(trainer):
        found = state.get(STOPPED, {}).get(callback.state_key)
        if found is not None and found["waits_for"] == _waits_for(callback):
            raise Finished(
                f"{name}: finished, stopped at step {saved_progress(state).steps}: {found['reason']} "
                f"(EarlyStopping); the weights are in {file} (raise its patience, or leave it out of "
                "trainer.callbacks, to train further)"
            )


class KeepsStopped(L.Callback):
    """Notes in checkpoints that an EarlyStopping has ended the run, so that the next call says so.

    And lets a resumed one wait for what is configured now: Lightning's goes on with its earlier patience.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._patience = [(callback, callback.patience) for callback in early_stopping(trainer)]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback, patience in self._patience:
            callback.patience, callback.stopping_reason_message = patience, None

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[STOPPED] = {
            callback.state_key: {"waits_for": _waits_for(callback), "reason": why(callback)}
            for callback in early_stopping(trainer)
            if callback.stopping_reason_message
        }


def early_stopping(trainer: L.Trainer) -> list[EarlyStopping]:
    """List the callbacks that may end a run early."""
    return [each for each in trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]


def why(callback: EarlyStopping) -> str:
    """Say why it stopped the run."""
    return shorten(str(callback.stopping_reason_message).split(" Signaling")[0], 150)


def _waits_for(callback: EarlyStopping) -> dict[str, float | bool | None]:
    names = ("patience", "min_delta", "stopping_threshold", "divergence_threshold", "check_finite")
    return {name: getattr(callback, name) for name in names}
