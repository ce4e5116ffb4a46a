"""Averages of several lengths, from which any length can be made after training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.callbacks.ema import EMA, Weights, averaged_parameters
from ldm.checkpointing.snapshots import Snapshot, forget_after, snapshot_interval, thin, write_snapshot
from ldm.distributed.dtensor import gather_full, shard_like
from ldm.optim.power_average import decay, exponent
from ldm.stage_protocols import progress_of


class PostHocEMA(L.Callback):
    """Keeps power-function averages of the weights, with snapshots of them in the folder ``averages``.

    ``ldm.convert post-hoc-ema`` makes an average of any length of the snapshots, when training is over or
    while it goes on (Karras et al. 2024, arXiv:2312.02696, section 3). They are kept beside the run's moving
    average, see ``ema``, which validation and checkpoints use as before.

    Each length takes 4 bytes per parameter in memory, in each checkpoint, and in each snapshot. A snapshot
    that cannot be written, e.g. on a full disk, is a warning.

    Args:
        sigma_rel: Lengths of the averages, in units of the training so far, in (0, 0.288].
        every_n_steps: Optimizer steps between two snapshots; one comes at the end of training too.
        max_snapshots: Most snapshots that are kept. With one more, every second is deleted, and from then on
            the interval is twice as long.
        dtype: Of the snapshots; float16 halves them.

    Raises:
        ValueError: If a length is not in (0, 0.288], if there are two of one, or if a number is not positive.
    """

    def __init__(
        self,
        sigma_rel: Sequence[float] = (0.05, 0.10),
        every_n_steps: int = 1000,
        max_snapshots: int = 32,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        self.sigma_rel = tuple(sigma_rel)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(
                f"PostHocEMA: sigma_rel is {list(sigma_rel)}, expected one or more different lengths"
            )
        if every_n_steps < 1 or max_snapshots < 2:
            raise ValueError(
                f"PostHocEMA: got every_n_steps {every_n_steps} and max_snapshots {max_snapshots}, expected "
                "at least 1 and 2"
            )
        self.every_n_steps = every_n_steps
        self.max_snapshots = max_snapshots
        self.dtype = getattr(torch, dtype)
        self.time = 0
        self.averages: list[Weights] = []
        self._gammas = [exponent(each) for each in self.sigma_rel]
        self._trained: list[nn.Parameter] = []
        self._last_step = self._written = -1

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move before all callbacks but the EMA: a checkpoint that one of them writes has the last step."""
        first = {EMA: 0, PostHocEMA: 1}
        trainer.callbacks = sorted(  # type: ignore[attr-defined]
            trainer.callbacks,  # type: ignore[attr-defined]
            key=lambda callback: first.get(type(callback), len(first)),
        )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the averages at the first weights, or go on from a checkpoint's."""
        weights = averaged_parameters(pl_module)
        self._trained = list(weights.values())
        before = self.averages or [{}] * len(self.sigma_rel)
        self.averages = [
            {
                name: shard_like(each.get(name, weight).detach(), weight).to(
                    weight.device, torch.float32, copy=True
                )
                for name, weight in weights.items()
            }
            for each in before
        ]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where training starts; later snapshots are of steps that are taken again."""
        self._last_step = progress_of(pl_module).steps
        if trainer.is_global_zero:
            forget_after(Path(trainer.default_root_dir), self._last_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages if the batch ended in an optimizer step; write a snapshot if one is due."""
        if (step := progress_of(pl_module).steps) == self._last_step:
            return
        self._last_step = step
        self._update()
        interval = snapshot_interval(step, self.every_n_steps, self.max_snapshots)
        if step % interval == 0:
            self._write(trainer, pl_module, interval)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the snapshot of the last step, if training has reached its end."""
        step = progress_of(pl_module).steps
        if 0 < trainer.max_steps <= step and self.time and self._written != step:
            self._write(trainer, pl_module, snapshot_interval(step, self.every_n_steps, self.max_snapshots))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sigma_rel": list(self.sigma_rel), "time": self.time, "averages": self.averages}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the averages.

        Raises:
            ValueError: If they are of other lengths.
        """
        if (saved := state_dict["sigma_rel"]) != list(self.sigma_rel):
            raise ValueError(
                f"PostHocEMA: sigma_rel is {list(self.sigma_rel)}, but the run averages over {saved}: "
                "name these, or begin another run"
            )
        self.time, self.averages = state_dict["time"], state_dict["averages"]

    @torch.no_grad()
    def _update(self) -> None:
        self.time += 1
        weights = [weight.float() for weight in self._trained]
        for gamma, average in zip(self._gammas, self.averages, strict=True):
            torch._foreach_lerp_(list(average.values()), weights, 1.0 - decay(gamma, self.time))

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, interval: int) -> None:
        """Write a snapshot by the first process; collective, for weights may be sharded."""
        progress = progress_of(pl_module)
        self._written = progress.steps
        full: list[dict[str, Tensor]] = gather_full(self.averages, trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        snapshot = Snapshot(progress, self.time, self.sigma_rel, _aliases(pl_module, self.averages[0]))
        averages = [{name: value.to(self.dtype) for name, value in each.items()} for each in full]
        run = Path(trainer.default_root_dir)
        try:
            write_snapshot(run, snapshot, averages)
            thin(run, interval, progress.steps)
        except OSError as error:
            warnings.warn(f"step {progress.steps}: no snapshot of the averages: {error}", stacklevel=2)


def _aliases(module: nn.Module, averaged: Weights) -> dict[str, str]:
    """List the further names of tied weights."""
    names = {id(weight): name for name, weight in module.named_parameters() if name in averaged}
    return {
        alias: names[id(weight)]
        for alias, weight in module.named_parameters(remove_duplicate=False)
        if id(weight) in names and names[id(weight)] != alias
    }
