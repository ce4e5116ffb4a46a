"""A loss or gradient that is not finite costs a step, not the weights."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ldm.loggers.steps import is_logged, read_losses
from ldm.optim.gradients import HostNumber, drop, part_norms, skip_if, total_norm
from ldm.stage_protocols import progress_of
from ldm.stages.counted import Counted
from ldm.types import Batch

NUM_KEYS = 4
"""Samples that a message names of each process."""


class Suspect(NamedTuple):
    """Losses and samples of one process at a step whose gradient is not finite."""

    losses: dict[str, float]
    keys: list[str]


class Verdict(NamedTuple):
    """Whether a step was skipped, and what it was of."""

    is_bad: HostNumber
    step: int
    losses: list[dict[str, Tensor]]
    keys: list[str]


class SkipNonFinite(L.Callback):
    """Skips optimizer steps whose loss or gradient is not finite, on all processes.

    Without such a step the weights, the moments of the optimizer and the average are as if the batch had
    not been there, but for the average's and the schedule's count. A loss that is not finite makes the
    gradient so; the sum of gradients over processes then is too, so that all decide alike.

    The fused AdamW decides on the device, and the host learns of it one step later. For other optimizers the
    host decides: on a GPU it waits for the gradient once per step.

    Logs ``train/skipped_steps``, a count.

    Args:
        max_in_a_row: So many skipped steps in a row end the run, with the weights of the last good one saved.

    Raises:
        ValueError: If ``max_in_a_row`` is less than 1.
    """

    def __init__(self, max_in_a_row: int = 20) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"NonFinite: max_in_a_row is {max_in_a_row}, expected at least 1")
        self.max_in_a_row = max_in_a_row
        self.num_skipped = self._in_a_row = 0
        self._num_logged: int | None = None
        self._keys: list[str] = []
        self._step = 0
        self._last: Verdict | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        # one process alone may save: nothing is reported here, for which all would have to meet
        is_bad = self._last is not None and bool(self._last.is_bad.read())
        in_a_row = self._in_a_row + 1 if is_bad else self._in_a_row if self._last is None else 0
        return {"num_skipped": self.num_skipped + is_bad, "in_a_row": in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped, self._in_a_row = state_dict["num_skipped"], state_dict["in_a_row"]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        step = progress_of(pl_module).steps
        self._keys = [*(self._keys if step == self._step else []), *batch["key"]]
        self._step = step

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # A hook that knew the loss itself would keep its graph, which knows the hook.
        is_finite = loss.detach().isfinite()
        loss.register_hook(lambda grad: torch.where(is_finite, grad, torch.nan))

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Skip the step if its gradient is not finite.

        Raises:
            ValueError: After ``max_in_a_row`` skipped steps in a row; names losses and samples.
        """
        self._settle(trainer)
        if isinstance(pl_module, Counted):
            norm, losses = pl_module.gradient_norm(optimizer), pl_module.step_losses
        else:
            norm, losses = total_norm(part_norms(optimizer)), []
        is_bad = norm.isfinite().logical_not().float()
        self._last = Verdict(HostNumber(is_bad), self._step, losses, self._keys)
        if not skip_if(optimizer, is_bad):
            if self._last.is_bad.read():
                drop(optimizer)
            self._settle(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if is_logged(trainer, progress_of(pl_module).steps):
            self._settle(trainer)
        elif self.num_skipped == self._num_logged:
            return
        self._num_logged = self.num_skipped
        pl_module.log("train/skipped_steps", float(self.num_skipped), batch_size=1)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)

    def _settle(self, trainer: L.Trainer) -> None:
        """Count and report the last step, if that has not been done; collective if it was skipped."""
        last, self._last = self._last, None
        if last is None:
            return
        if not last.is_bad.read():
            self._in_a_row = 0
            return
        self.num_skipped += 1
        self._in_a_row += 1
        suspect = Suspect(_losses(trainer, last), last.keys)
        self._report(trainer, last.step, _gather(trainer, suspect))

    def _report(self, trainer: L.Trainer, step: int, suspects: list[Suspect]) -> None:
        reason = _reason(suspects)
        if self._in_a_row == self.max_in_a_row:
            self._in_a_row = 0  # the run may be resumed, with other settings
            raise ValueError(
                f"{self.max_in_a_row} steps in a row without a finite loss and gradient, at last step "
                f"{step}: {reason}. The weights are those of the last good step: resume with "
                "a smaller --model.optimizer.lr or other data"
            )
        if trainer.is_global_zero:
            print(f"warning: step {step} is skipped: {reason}", file=sys.stderr, flush=True)


def _losses(trainer: L.Trainer, verdict: Verdict) -> dict[str, float]:
    """Read this process's losses of the step that are not finite, by their names in the log."""
    logged = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("train/")}
    found = {**logged, **read_losses(verdict.losses)}
    return {name: value for name, value in found.items() if not -torch.inf < value < torch.inf}


def _gather(trainer: L.Trainer, mine: Suspect) -> list[Suspect]:
    if trainer.world_size == 1:
        return [mine]
    suspects: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(suspects, mine)
    return suspects


def _reason(suspects: list[Suspect]) -> str:
    """Name losses and samples of the processes with a loss that is not finite; if none has one, of all."""
    guilty = {rank: suspect for rank, suspect in enumerate(suspects) if suspect.losses}
    lines = [
        f"process {rank}: {_terms(suspect)}, samples {_names(suspect.keys)}"
        for rank, suspect in (guilty or dict(enumerate(suspects))).items()
    ]
    return "; ".join(lines)


def _terms(suspect: Suspect) -> str:
    terms = ", ".join(f"{name} is {value}" for name, value in suspect.losses.items())
    return terms or "the gradient is not finite though the losses are"


def _names(keys: list[str]) -> str:
    rest = len(keys) - NUM_KEYS
    return ", ".join(keys[:NUM_KEYS]) + (f" and {rest} more" if rest > 0 else "")
