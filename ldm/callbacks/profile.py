"""A trace of some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities
from typing_extensions import override


class Profile(L.Callback):
    """Writes ``profile-RANK.json.gz`` into the run's folder: what host and device did in some steps.

    The first steps, which compile and choose kernels, are left out; a run that is too short for them and the
    trace is a warning.

    Args:
        num_steps: Batches in the trace.
        skip: Batches before it.

    Raises:
        ValueError: If ``num_steps`` is not positive.
    """

    def __init__(self, num_steps: int, skip: int = 5) -> None:
        if num_steps < 1:
            raise ValueError(f"profile: got {num_steps}, expected a positive number of steps")
        self.num_steps, self.skip = num_steps, skip
        self._profiler: profile | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"profile-{trainer.global_rank}.json.gz"
        self._profiler = profile(
            activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA},
            schedule=schedule(wait=self.skip, warmup=1, active=self.num_steps, repeat=1),
            on_trace_ready=lambda found: found.export_chrome_trace(str(path)),
        )
        self._profiler.start()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        if self._profiler is not None:
            self._profiler.step()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = 0 if self._profiler is None else self._profiler.step_num
        self._stop()
        left_out = self.skip + 1
        if done < left_out + self.num_steps:
            rank_zero_warn(
                f"profile: the trace has {max(0, done - left_out)} of {self.num_steps} steps: the run ended "
                f"after {done} batches, of which the first {left_out} are left out"
            )

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
