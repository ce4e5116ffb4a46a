"""Estimates of x0 by a diffusion model, with its condition and without."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.objective import Network
from ldm.types import Batch, Cond, Denoise

if TYPE_CHECKING:
    from ldm.stages.draws import Draws


@dataclass(frozen=True)
class Estimates:
    """What guidance combines: a ``Conditional``.

    Args:
        stage: Whose network and conditioner.
        estimator: Turns the raw network, its condition given, into an estimate.
    """

    stage: Draws
    estimator: Callable[[Network], Denoise]

    def cond(self, batch: Batch) -> Denoise:
        """Condition on ``batch``: a function from (x_t, t) to x0_hat."""
        return self._denoise(self.stage.conditioner(batch))

    def uncond(self, batch: Batch) -> Denoise:
        """Condition on nothing, for as many samples as ``batch`` has."""
        return self._denoise(self._null(batch))

    def cond_and_uncond(self, batch: Batch) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Condition on ``batch`` and on nothing, in a pass over 2 B samples: a few alone leave a GPU idle."""
        denoise = self._denoise(self.stage.conditioner(batch).concat(self._null(batch)))

        def pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = denoise(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
            return cond, uncond

        return pair

    def _null(self, batch: Batch) -> Cond:
        conditioner = self.stage.conditioner
        is_trained = conditioner.drops or "negative_text" in batch
        if conditioner.reads and not is_trained:
            warnings.warn(
                "model.guidance: uses the estimate without condition, which this model was not trained for: "
                "model.conditioner.dropout is 0; expected e.g. 0.1 in training, or no guidance (scale 1)",
                stacklevel=2,
            )
        return conditioner.null(batch)

    def _denoise(self, cond: Cond) -> Denoise:
        return self.estimator(self.stage.network(cond))
