"""Reconstruction errors as a likelihood whose variance is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.losses.term import LossTerm
from ldm.optim.recipes import Optimization
from ldm.types import Batch


class LearnedVariance(LossTerm):
    """Negative log-likelihood sum_i w_i l_i / s + N ln s of reconstruction errors l_i, with ln s learned.

    N = 3 H W counts the values of an image. As Rombach et al.'s program has it for the absolute error and
    LPIPS, each summed over the image: a Laplace distribution of scale s, but for a constant.

    Args:
        terms: The errors; each is logged by its name.
        initial: ln s at first.
        optimizer: Recipe of ln s; that of the stage unless given.
        weight: Factor of the term in the loss.
    """

    name = "nll"
    log_scale: Tensor

    def __init__(
        self,
        terms: Sequence[LossTerm],
        initial: float = 0.0,
        optimizer: Optimization | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight, optimizer)
        self.terms = nn.ModuleList(terms)
        self.reads = tuple(dict.fromkeys(field for term in terms for field in term.reads))
        self.log_scale = nn.Parameter(torch.full((1,), initial))

    @property
    @override
    def names(self) -> tuple[str, ...]:
        terms = cast(Sequence[LossTerm], self.terms)
        return (self.name, "log_scale", *(name for term in terms for name in term.names))

    @property
    @override
    def lower_is_better(self) -> tuple[str, ...]:
        terms = cast(Sequence[LossTerm], self.terms)
        return (self.name, *(name for term in terms for name in term.lower_is_better))

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        active = [term for term in cast(Sequence[LossTerm], self.terms) if term.is_active]
        values = {term.name: term(batch, outputs) for term in active}
        error = cast(Tensor, sum(term.scale * values[term.name] for term in active))
        size = batch["image"][0].numel()
        self.logged = {**values, "log_scale": self.log_scale.expand_as(error)}
        return error * torch.exp(-self.log_scale) + size * self.log_scale

    @override
    def at(self, samples: int) -> None:
        super().at(samples)
        for term in cast(Sequence[LossTerm], self.terms):
            term.at(samples)

    @override
    def prepare(self) -> None:
        for term in cast(Sequence[LossTerm], self.terms):
            term.prepare()

    @override
    def validate_size(self, size: int) -> None:
        for term in cast(Sequence[LossTerm], self.terms):
            term.validate_size(size)
