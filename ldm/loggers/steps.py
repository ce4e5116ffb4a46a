"""Which steps are logged, and the losses of a step: read only where they are shown, for reading waits."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor

TRUNCATED = "train/truncated_captions"
"""Share of captions with more tokens than the text tower reads; known of logged steps only."""


def is_logged(trainer: L.Trainer, steps: int) -> bool:
    """Whether Lightning hands logged values to the loggers at the end of a step.

    Args:
        trainer: In ``on_train_batch_end``.
        steps: Optimizer steps done, the step that ends included.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return is_due(trainer, steps) or (every > 0 and trainer.should_stop)


def is_due(trainer: L.Trainer, steps: int) -> bool:
    """Whether a step is logged by its number, as all processes know alike: each n-th, and the last."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (steps % every == 0 or 0 < trainer.max_steps <= steps)


def mean_losses(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each loss over the batches of a step, of one size, in float32; nothing of no batches.

    Only what all batches have.
    """
    names = [name for name in (batches[0] if batches else ()) if all(name in batch for batch in batches)]
    return {name: torch.stack([batch[name].float() for batch in batches]).mean() for name in names}


def read_losses(batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Read this process's mean losses of a step by their names in the log; waits for the device once."""
    means = mean_losses([{k: v for k, v in batch.items() if "truncated" not in k} for batch in batches])
    return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)) if means else {}
