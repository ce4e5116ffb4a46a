"""Average the trained weights, and let validation and checkpoints use the average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from typing_extensions import override

from ldm.distributed.dtensor import reshard, shard_like
from ldm.stage_protocols import ExcludesParameters, progress_of

Weights = dict[str, Tensor]


class EMA(L.Callback):
    """Keeps an exponential moving average of the trained parameters.

    shadow <- d_n shadow + (1 - d_n) weight after optimizer step n + 1, with d_n = ``decay``, or
    d_n = min(decay, (1 + n) / (10 + n)) while it warms up, so that the first steps are soon forgotten.

    Frozen parameters, buffers, and what a stage leaves out, e.g. parameters of loss terms, have no average.
    All of validation uses the average, in the stage and in every other callback. A checkpoint's
    ``state_dict`` is the average (its key ``weights`` says "ema"); what training resumes from lies in the
    callback's own part, so that a resumed run equals an uninterrupted one bit for bit.

    Args:
        decay: Weight of the past in [0, 1); 0.9999 remembers about 10,000 steps.
        warmup: Whether the decay grows from 0.1 at the first step.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay is {decay}, expected a number in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadow: Weights = {}
        self._trained: list[nn.Parameter] = []
        self._raw: Weights | None = None
        self._last_step = 0

    @contextmanager
    def swapped(self, pl_module: nn.Module) -> Iterator[None]:
        """Put the averaged weights into ``pl_module`` for the length of a ``with`` block."""
        if self._raw is not None:
            yield
            return
        self._swap(pl_module)
        try:
            yield
        finally:
            self._unswap(pl_module)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move to the front of the callbacks, where every hook comes before the others'.

        The average is swapped in before any callback sees ``on_validation_start``, and swapped out by
        the first hook of training that follows, before any other callback or the stage sees that one.

        Raises:
            ValueError: If a ModelCheckpoint saves weights only: Lightning then asks no callback.
        """
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise ValueError(
                    "ModelCheckpoint: save_weights_only is true, expected false with the EMA callback"
                )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the average at the first weights, or go on from a checkpoint's."""
        weights = averaged_parameters(pl_module)
        self._trained = list(weights.values())  # in the order of the shadow: no step looks for them again
        self.shadow = {
            name: shard_like(self.shadow.get(name, weight).detach(), weight).to(
                weight.device, torch.float32, copy=True
            )
            for name, weight in weights.items()
        }

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember where training starts, and leave the raw weights after a sanity check."""
        self._unswap(pl_module)
        self._last_step = progress_of(pl_module).steps

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the batch ended in an optimizer step."""
        if (step := progress_of(pl_module).steps) > self._last_step:
            self._last_step = step
            self._update()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averaged weights."""
        if self._raw is None:
            self._swap(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train the raw weights."""
        self._unswap(pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights after a validation at the end of an epoch."""
        self._unswap(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights after a validation at the end of training."""
        self._unswap(pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the raw weights after an error in validation, before anything else is done about it."""
        reshard(pl_module)  # it may have come while they were unsharded
        self._unswap(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the raw weights after ``trainer.validate``."""
        self._unswap(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates; ``on_save_checkpoint`` adds the raw weights."""
        return {"num_updates": self.num_updates}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.num_updates = state_dict["num_updates"]

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the average as the weights, and the raw weights as the callback's state, swapped or not."""
        if not self.shadow:
            return
        weights = self._weights(pl_module)
        checkpoint["callbacks"][self.state_key]["raw"] = self._raw or {
            n: w.detach() for n, w in weights.items()
        }
        owner = {id(weight): name for name, weight in weights.items()}
        for alias, weight in pl_module.named_parameters(remove_duplicate=False):
            if id(weight) in owner:  # tied weights have several names in a state_dict
                checkpoint["state_dict"][alias] = self.shadow[owner[id(weight)]]
        checkpoint["weights"] = "ema"

    @override
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the raw weights back, when training resumes.

        Lightning calls this after it loaded ``state_dict`` into the model. In other runs the model
        keeps the average.
        """
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != "fit" or state is None or "raw" not in state:
            return
        weights = dict(pl_module.named_parameters())
        # float32, as written: the model's own copy may be rounded to a narrower type
        self.shadow = {name: checkpoint["state_dict"][name] for name in state["raw"] if name in weights}
        with torch.no_grad():
            for name in self.shadow:
                weights[name].copy_(state["raw"][name])

    def _weights(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in pl_module.named_parameters() if name in self.shadow}

    @torch.no_grad()
    def _update(self) -> None:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        weights = [weight.float() for weight in self._trained]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def _swap(self, pl_module: nn.Module) -> None:
        weights = self._weights(pl_module)
        self._raw = {name: weight.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.shadow[name])

    @torch.no_grad()
    def _unswap(self, pl_module: nn.Module) -> None:
        if self._raw is None:  # before every step
            return
        raw, self._raw = self._raw, None
        reshard(pl_module)  # validation unshards it
        for name, weight in self._weights(pl_module).items():
            if name in raw:
                weight.copy_(raw[name])


def averaged_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to average, by name: those that the stage names, else all that are trained."""
    if isinstance(module, ExcludesParameters):
        return module.averaged_parameters()
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
