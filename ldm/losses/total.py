"""The sum of loss terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from ldm.losses.balance import Balance, LastLayer
from ldm.losses.term import LossTerm
from ldm.types import Batch


def sum_terms(
    terms: Sequence[LossTerm], batch: Batch, outputs: Mapping[str, Tensor], last: LastLayer | None = None
) -> dict[str, Tensor]:
    """Compute "loss", the weighted sum of the terms that have begun, and the mean of each value by its name.

    A term with an adaptive weight, and what terms minimise for themselves, are left out of the loss's value:
    they add their gradients. So do, with gradients of 0, parameters of terms that have not begun: all
    processes know of all parameters at every step.

    Args:
        terms: The terms; each knows the samples seen so far.
        batch: B samples.
        outputs: What the stage computed from them.
        last: What ``outputs["image"]`` was made by, if terms may have an adaptive weight.
    """
    active = [term for term in terms if term.is_active]
    adaptive = [term for term in active if term.max_adaptive is not None]
    balance, seen = None, dict.fromkeys(active, outputs)
    if adaptive and last is not None and outputs["image"].requires_grad:
        bounds = [cast(float, term.max_adaptive) for term in adaptive]
        balance = Balance(last, [term.scale for term in adaptive], bounds)
        image, *images = balance.split(outputs["image"])
        seen = {term: {**outputs, "image": image} for term in active}
        seen |= {t: {**outputs, "image": i} for t, i in zip(adaptive, images, strict=True)}
    values = {term: term(batch, seen[term]) for term in active}
    fixed = [term.scale * value for term, value in values.items() if term not in adaptive]
    loss = cast(Tensor, sum(fixed)).mean() if fixed else outputs["image"].new_zeros(())
    for gradient in _gradients(terms, values, adaptive, batch, outputs):
        loss = loss + (gradient - gradient.detach())
    found = {"loss": loss}
    for term, value in values.items():
        found[term.name] = value.mean()
        found |= {name: logged.mean() for name, logged in term.logged.items()}
        if balance is not None and term in adaptive:
            found[f"{term.name}_weight"] = balance.weights[adaptive.index(term)]
    return found


def _gradients(
    terms: Sequence[LossTerm],
    values: Mapping[LossTerm, Tensor],
    adaptive: Sequence[LossTerm],
    batch: Batch,
    outputs: Mapping[str, Tensor],
) -> list[Tensor]:
    """List the scalars of which the loss takes the gradients alone."""
    found = [values[term].mean() for term in adaptive]
    own = [term.own_loss(batch, outputs) for term in values]
    found += [loss.mean() for loss in own if loss is not None]
    if torch.is_grad_enabled():
        waiting = [term for term in terms if term not in values]
        found += [0.0 * weight.sum() for term in waiting for weight in term.parameters()]
    return found
