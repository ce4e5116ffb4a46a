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

    Raises:
        ValueError: If a term has parameters of its own or an adaptive weight, which are the stage's business,
            or if none begins with training: no error has no scale.
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
        _check(terms)
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


def _check(terms: Sequence[LossTerm]) -> None:
    for term in terms:
        if term.max_adaptive is not None or any(weight.requires_grad for weight in term.parameters()):
            found = "an adaptive weight" if term.max_adaptive is not None else "parameters of its own"
            raise ValueError(
                f"model.reconstruction: LearnedVariance got {term.name} ({type(term).__name__}), which has "
                f"{found}, expected errors that need no training: put it into model.losses"
            )
    if all(term.start for term in terms):
        found = ", ".join(f"{term.name} from {term.start}" for term in terms) or "none"
        raise ValueError(
            f"model.reconstruction: LearnedVariance got terms: {found}, expected one without start: the "
            "variance is that of an error"
        )
