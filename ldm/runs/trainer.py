"""The trainer of ``ldm.fit``: which of Lightning's options and callbacks it takes, and why training ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from textwrap import shorten
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch import callbacks as theirs
from typing_extensions import override

from ldm.hardware import explaining_memory
from ldm.runs.finished import KeepsStopped, early_stopping, why
from ldm.stage_protocols import Progress

VALIDATE_EVERY = 1000
"""Most optimizer steps between two validations, and so two checkpoints, where no interval is given."""


class TimeLimit(theirs.Timer):
    """Ends training when this call has trained for as long; a resumed run has all the time again."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}


class Trainer(L.Trainer):
    """Lightning's Trainer.

    Args:
        precision: What networks compute in: bf16-mixed, 32-true, or Lightning's other names; auto takes
            bf16-mixed where the processor computes bfloat16 natively, and 32-true where it does not.
        deterministic: Compute the same bits in each run on a GPU, more slowly; ``benchmark`` and
            ``float32_matmul`` are then left out.
        benchmark: Try algorithms of cuDNN for each size in the first step, and use the fastest.
        float32_matmul: What products of float32 matrices on GPUs are computed in: float32 (highest), TF32
            (high) or bfloat16 (medium).
        max_time: How long a call of the command trains, as DD:HH:MM:SS.
        callbacks: What else happens in training. A progress bar takes the place of those before it.
    """

    def __init__(
        self,
        precision: Literal[
            "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"
        ] = "auto",
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        float32_matmul: Literal["highest", "high", "medium"] = "highest",
        max_time: str | timedelta | dict[str, int] | None = None,
        callbacks: list[L.Callback] | L.Callback | None = None,
        **kwargs: Any,
    ) -> None:
        some = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks or [])
        check_callbacks(some)
        bars = [callback for callback in some if isinstance(callback, theirs.ProgressBar)]
        some = [callback for callback in some if callback not in bars[:-1]]
        if max_time is not None:
            some.append(TimeLimit(max_time))
        if any(isinstance(callback, theirs.EarlyStopping) for callback in some):
            some.append(KeepsStopped())
        super().__init__(
            precision=None if precision == "auto" else precision,
            callbacks=some,
            deterministic=deterministic,
            benchmark=False if deterministic else benchmark,
            **kwargs,
        )
        if self.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if deterministic else float32_matmul)

    @override
    @explaining_memory(
        "a smaller data.batch_size, with more trainer.accumulate_grad_batches",
        "trainer.callbacks+=ActivationCheckpointing",
        "trainer.strategy=fsdp2",
    )
    def fit(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().fit(*args, **kwargs)
        except ModuleNotFoundError as error:
            if error.name is not None:  # an import failed: Lightning names no module for what is optional
                raise
            raise ValueError(f"trainer.callbacks: {shorten(str(error), 250)}") from error
        except RuntimeError as error:
            if not str(error).startswith("Early stopping conditioned on metric"):
                raise
            waits = [callback.monitor for callback in early_stopping(self)]
            missing = [name for name in waits if name not in self.callback_metrics]
            logged = ", ".join(sorted(name for name in self.callback_metrics if name.startswith("val/")))
            raise ValueError(
                f"trainer.callbacks: EarlyStopping monitors {', '.join(missing)}, which was not logged, "
                f"expected one of {shorten(logged, 150)}"
            ) from error


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Check that no callback does what the run does by other means.

    Raises:
        ValueError: If one does; it says what to use.
    """
    instead = {
        theirs.GradientAccumulationScheduler: "trainer.accumulate_grad_batches, by which samples are counted",
        theirs.StochasticWeightAveraging: "the moving average that every run has, see ema.decay",
    }
    if (averaging := getattr(theirs, "WeightAveraging", None)) is not None:
        instead[averaging] = instead[theirs.StochasticWeightAveraging]
    for callback in callbacks:
        for kind, better in instead.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: got {type(callback).__name__}, expected {better}")
        if isinstance(callback, theirs.Timer) and callback.time_remaining() is not None:
            raise ValueError("trainer.callbacks: got Timer with a duration, expected trainer.max_time")


def settle(trainer: Namespace, is_endless: bool) -> None:
    """Check that a run ends, and settle when it is validated and saved.

    Args:
        trainer: Options of the trainer; ``val_check_interval`` is set if it is not given.
        is_endless: Whether the data are a stream of batches without epochs.

    Raises:
        ValueError: If the run would not end, or if intervals are not counted in batches.
    """
    steps, epochs, every = trainer.max_steps, trainer.max_epochs, trainer.val_check_interval
    if trainer.fast_dev_run:
        return
    if is_endless and epochs not in (None, -1):
        raise ValueError(
            f"trainer.max_epochs: got {epochs}, expected trainer.max_steps: shards have no epochs"
        )
    if is_endless and (epoch := trainer.check_val_every_n_epoch) is not None:
        raise ValueError(
            f"trainer.check_val_every_n_epoch: got {epoch}, expected null: shards have no epochs, and "
            "trainer.val_check_interval counts batches"
        )
    if steps in (None, -1) and epochs in (None, -1) and trainer.max_time is None:
        raise ValueError(
            "trainer.max_steps: got none, expected how many optimizer steps to train, or trainer.max_time: "
            "the run would not end"
        )
    if trainer.check_val_every_n_epoch is not None:
        return
    if every is None:
        tenth = steps // 10 if steps and steps > 0 else VALIDATE_EVERY
        trainer.val_check_interval = max(1, min(VALIDATE_EVERY, tenth)) * trainer.accumulate_grad_batches
    elif not isinstance(every, int):
        raise ValueError(
            f"trainer.val_check_interval: got {every}, expected a number of batches: so runs resume exactly"
        )


def ending(trainer: L.Trainer, done: Progress) -> str:
    """Report the progress of training, and why it ended if it is not done.

    Args:
        trainer: One whose ``fit`` has returned.
        done: Of its stage.
    """
    end, reason = trainer.max_steps, None
    if 0 < end <= done.steps:
        return f"done, {done.steps} steps, {done.samples} samples"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TimeLimit) and (callback.time_remaining() or 0) <= 0:
            reason = "trainer.max_time is used up; the same command trains for as long again"
        elif isinstance(callback, theirs.EarlyStopping) and callback.stopping_reason_message and not reason:
            reason = f"{why(callback)} (EarlyStopping)"
    if reason is None:
        reason = "a callback stopped it" if trainer.should_stop else "its epochs are over"
    of = f" of {end}" if end > 0 else ""
    return f"stopped at step {done.steps}{of}, {done.samples} samples: {reason}"
