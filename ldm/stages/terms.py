"""Loss terms of a stage: their sum, their schedule, and what becomes of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ldm.io.weights import tensors_sha256
from ldm.losses.balance import LastLayer
from ldm.losses.term import LossTerm
from ldm.losses.total import sum_terms
from ldm.nets.frozen import Frozen
from ldm.nets.hidden import HiddenStates
from ldm.stages.counted import Counted, global_batch_size
from ldm.types import Batch, DenoiserDims

TERMS = "terms"
"""Attribute that holds the loss terms, and prefix of the names of their parameters."""


class SumsTerms(Counted):
    """A module with loss terms, which begin and grow with the samples seen.

    Args:
        terms: Loss terms that ``sum_terms`` adds up. Their own parameters are trained and saved, but neither
            averaged nor exported.

    Raises:
        ValueError: If two terms have one name.
    """

    def __init__(self, terms: Sequence[LossTerm] = ()) -> None:
        super().__init__()
        names = ["loss", *(name for term in terms for name in term.names)]
        if len(set(names)) < len(names):
            raise ValueError(f"model.losses: got {', '.join(names[1:])}, expected distinct names, not 'loss'")
        self.terms = nn.ModuleList(terms)
        self._frozen: dict[str, str] = {}

    @property
    def loss_terms(self) -> Sequence[LossTerm]:
        """The loss terms."""
        return cast(Sequence[LossTerm], self.terms)

    def sum_terms(
        self, batch: Batch, outputs: Mapping[str, Tensor], last: LastLayer | None = None
    ) -> dict[str, Tensor]:
        """Compute "loss", the weighted sum of the loss terms, and the mean of each by its name.

        Args:
            batch: B samples.
            outputs: What the stage computed from them.
            last: What ``outputs["image"]`` was made by, for terms with an adaptive weight.
        """
        for term in self.loss_terms:
            term.at(self.progress.samples)
        return sum_terms(self.loss_terms, batch, outputs, last)

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters that are averaged and exported: all but those of loss terms."""
        training_only = {id(weight) for weight in self.terms.parameters()}
        return {
            name: weight
            for name, weight in self.named_parameters()
            if weight.requires_grad and id(weight) not in training_only
        }

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            with torch.random.fork_rng(devices=[]):  # what they draw is the same in any number of processes
                torch.manual_seed(torch.initial_seed() + 1)
                for term in self.loss_terms:
                    term.prepare()
            self._frozen = dict(_hash_frozen(self.loss_terms))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["frozen_networks"] = self._frozen

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, then in checkpoint.get("frozen_networks", {}).items():
            if (now := self._frozen.get(name, then)) != then:
                raise ValueError(
                    f"model.losses: the weights of '{name}' are others than when this run began (SHA-256 "
                    f"{now[:12]} now, {then[:12]} then): restore their file, or start a new run folder"
                )

    @override
    def on_train_start(self) -> None:
        end = self.trainer.max_steps
        is_dry: bool = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_dry or end <= 0 or not any(term.start for term in self.loss_terms):
            return
        samples = end * global_batch_size(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        for term in self.loss_terms:
            if term.start >= samples:
                raise ValueError(
                    f"model.losses: {term.name} starts after {term.start} samples, but the run ends after "
                    f"{samples}: expected a smaller start, or a larger trainer.max_steps than {end}"
                )

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out what has not begun: an optimizer passes over parameters without a gradient."""
        for term in self.loss_terms:
            if not term.is_active:
                for weight in term.parameters():
                    weight.grad = None

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for term in self.loss_terms:
            term.on_step()


def _hash_frozen(terms: Iterable[LossTerm]) -> Iterator[tuple[str, str]]:
    """Yield the name of each frozen network that loss terms use, and the SHA-256 of its weights."""
    for term in terms:
        for name, holder in term.named_modules():
            if isinstance(holder, Frozen):
                network = holder
                while isinstance(network, Frozen):
                    network = network.module
                owners = [part for part in name.split(".") if not part.startswith("_")]
                yield ".".join([term.name, *owners]), tensors_sha256(network.state_dict())


def bind_terms(terms: Sequence[LossTerm], denoiser: nn.Module, dims: DenoiserDims) -> HiddenStates | None:
    """Give loss terms the hidden states of a denoiser that they name; None without terms.

    Raises:
        ValueError: If the denoiser has no such module.
    """
    if not terms:
        return None
    hidden = HiddenStates(denoiser, [name for term in terms for name in term.hidden])
    channels = hidden.channels(dims)
    for term in terms:
        term.bind(channels)
    return hidden


def without_terms(module: SumsTerms) -> nn.Module:
    """Return a module with another's parameters by their names, but for those of loss terms."""
    rest = nn.Module()
    for name, weight in module.named_parameters(recurse=False):
        rest.register_parameter(name, weight)
    for name, child in module.named_children():
        if name != TERMS:
            rest.add_module(name, child)
    return rest
