"""Token routing: some tokens pass by a range of blocks in training, which costs less for each step."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.io.config import Configurable
from ldm.rng import Noise


class Routing(Configurable):
    """A random share of the tokens passes by the blocks ``first`` to ``last``, in training alone: TREAD.

    Krause et al. 2025 (arXiv:2501.04765): those tokens are as they were before the route when they come back
    after it. Which ones, is drawn anew for each sample and step.

    Args:
        first: First block of the route, counted from 0; all tokens go through at least one before it.
        last: Last block of it.
        ratio: Share of the tokens that pass by, in (0, 1).

    Raises:
        ValueError: If ``ratio`` or the range is not possible.
    """

    def __init__(self, first: int, last: int, ratio: float = 0.5) -> None:
        if not 0.0 < ratio < 1.0 or not 1 <= first <= last:
            raise ValueError(
                f"denoiser.routing: got first {first}, last {last}, ratio {ratio}, expected 1 <= first <= "
                "last, and a ratio between 0 and 1"
            )
        self.first, self.last, self.ratio = first, last, ratio

    def check(self, depth: int) -> None:
        """Check that a network of ``depth`` blocks has those of the route.

        Raises:
            ValueError: If it does not.
        """
        if self.last >= depth:
            raise ValueError(
                f"denoiser.routing.last: got {self.last}, expected at most {depth - 1}, the last of {depth} "
                "blocks"
            )

    def end(self, width: int) -> RouteEnd:
        """Make what follows the last block of the route, for tokens of ``width``."""
        return RouteEnd()

    def draw(self, count: int, tokens: int, like: Tensor, noise: Noise) -> Route:
        """Draw the tokens that stay on the way, for ``count`` samples of ``tokens`` each.

        Args:
            count: B.
            tokens: N.
            like: Of the device that the route is used on.
            noise: Source of random numbers.
        """
        kept = max(1, tokens - round(self.ratio * tokens))
        order = noise(like.new_empty(count, tokens, dtype=torch.float32)).argsort(dim=1)
        return Route(order[:, :kept].sort(dim=1).values)


class Sprint(Routing):
    """Most tokens pass by the blocks ``first`` to ``last`` in training, and the paths are fused: SPRINT.

    Park et al. 2025 (arXiv:2510.21986): a linear layer joins what comes out of the route, where a learned
    vector stands for the tokens that passed by, with what went in. Sampling and validation have the layer
    too, with all tokens on the route, so that a model trained with it needs it.

    Args:
        first: First block of the route, counted from 0; 2 in the paper.
        last: Last block of it; the third from the end in the paper.
        ratio: Share of the tokens that pass by, in (0, 1).
        drop: Share of the samples of which nothing comes out of the route, in [0, 1).

    Raises:
        ValueError: If ``ratio``, ``drop`` or the range is not possible.
    """

    def __init__(self, first: int, last: int, ratio: float = 0.75, drop: float = 0.05) -> None:
        super().__init__(first, last, ratio)
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"denoiser.routing.drop must be in [0, 1), got {drop}")
        self.drop = drop

    @override
    def end(self, width: int) -> RouteEnd:
        return Fusion(width)

    @override
    def draw(self, count: int, tokens: int, like: Tensor, noise: Noise) -> Route:
        kept = super().draw(count, tokens, like, noise).kept
        normal = noise(like.new_empty(count, 1, dtype=torch.float32))
        return Route(kept, normal < (NormalDist().inv_cdf(self.drop) if self.drop else -torch.inf))


@dataclass(frozen=True)
class Route:
    """The tokens that go through the blocks.

    Args:
        kept: (B, K) int64, their positions in increasing order.
        is_dropped: (B, 1) bool, samples of which nothing comes out of the route; None: of all something does.
    """

    kept: Tensor
    is_dropped: Tensor | None = None

    def take(
        self, hidden: Tensor, rotation: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Take them out of what a block gets, see ``DiTBlock``; the rotation becomes (2, B, 1, K, d / 2)."""
        return (
            self._tokens(hidden),
            None if rotation is None else rotation[:, self.kept].unsqueeze(2),
            None if values is None else self._tokens(values),
        )

    def back(self, whole: Tensor, part: Tensor) -> Tensor:
        """Put (B, K, C) in their places among the others, (B, N, C)."""
        index = self.kept[:, :, None].expand(part.shape)
        return whole.to(part.dtype).scatter(1, index, part)

    def _tokens(self, x: Tensor) -> Tensor:
        index = self.kept[:, None, :, None] if x.ndim == 4 else self.kept[:, :, None]
        return x.gather(-2, index.expand(*x.shape[:-2], self.kept.shape[1], x.shape[-1]))


class RouteEnd(nn.Module):
    """Puts the tokens of the route in their places among those that passed by, which are as they were."""

    def forward(self, before: Tensor, after: Tensor, route: Route | None) -> Tensor:
        """Join both.

        Args:
            before: (B, N, C), all tokens as they were before the route.
            after: (B, K, C), those on it; (B, N, C) without a route, which all tokens were on.
            route: Which they are, or None.
        """
        return after if route is None else route.back(before, after)


class Fusion(RouteEnd):
    """A linear layer from what comes out of the route and what went in, with a vector for what passed by.

    Args:
        width: Width of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(width))
        self.linear = nn.Linear(2 * width, width)

    @override
    def forward(self, before: Tensor, after: Tensor, route: Route | None) -> Tensor:
        if route is not None:
            absent = self.absent.expand(before.shape)
            after = route.back(absent, after)
            if route.is_dropped is not None:
                after = torch.where(route.is_dropped[:, :, None], absent.to(after.dtype), after)
        return self.linear(torch.cat([before, after], dim=-1))


@runtime_checkable
class RoutesTokens(Protocol):
    """A denoiser that may route tokens past some of its blocks."""

    def draw_route(self, x: Tensor, noise: Noise) -> None:
        """Draw which tokens of latents ``x`` (B, C, h, w) are routed, in training, from now on."""
        ...
