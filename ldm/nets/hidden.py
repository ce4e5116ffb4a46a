"""Hidden states of named modules of a denoiser, while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.types import Cond, DenoiserDims

PROBE = 64
"""Side of a latent that most patches and levels divide."""


class HiddenStates:
    """Outputs of modules of a denoiser in its last forward pass of training.

    Args:
        network: The denoiser.
        names: Names of modules of it, e.g. ``transformer_blocks.7`` or ``mid_block.resnets.1``.

    Raises:
        ValueError: If it has no such module, or tokens of it are routed past that one.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._network, self._names = network, tuple(dict.fromkeys(names))
        self._found: dict[str, Tensor] = {}
        modules = dict(network.named_modules())
        for name in self._names:
            if name not in modules:
                parent = name.rpartition(".")[0]
                near = [each for each in modules if each and each.rpartition(".")[0] == parent]
                near = near or [each for each in modules if each.count(".") == 1]
                raise ValueError(
                    f"model.losses: the denoiser {type(network).__name__} has no block '{name}', expected "
                    f"such as {', '.join(near[:3])}"
                )
            if name in getattr(network, "routed", ()):
                raise ValueError(
                    f"model.losses: only some tokens go through the block '{name}', expected one before the "
                    "route of model.denoiser.routing begins or after its end"
                )
            modules[name].register_forward_hook(self._keep(name))

    def channels(self, dims: DenoiserDims) -> dict[str, int]:
        """Count the channels of each module's output, by a forward pass that computes no number.

        Args:
            dims: What the denoiser was built from.

        Raises:
            ValueError: If the forward pass does not call a module, or it returns no hidden states.
        """
        meta = {
            name: torch.empty_like(value, device="meta")
            for name, value in (*self._network.named_parameters(), *self._network.named_buffers())
        }
        side = lcm(PROBE, int(getattr(self._network, "factor", 1)))
        x, t, cond = _probe(dims, side)
        was_training = self._network.training
        with torch.no_grad():
            functional_call(self._network.train(), meta, (x, t, cond))
        self._network.train(was_training)
        for name in self._names:
            if name not in self._found or self._found[name].ndim not in (3, 4):
                raise ValueError(
                    f"model.losses: the block '{name}' of the denoiser has no hidden states of its own, "
                    "expected a module that its forward pass calls, e.g. mid_block.resnets.1 of a UNet"
                )
        return {n.removeprefix("hidden/"): v.shape[1] for n, v in self.take(side, side).items()}

    def take(self, height: int, width: int) -> dict[str, Tensor]:
        """Return the outputs as maps (B, C, h, w), each as hidden/<module>, and forget them.

        Args:
            height: Height of the image or latent, of which the maps have the proportions.
            width: Width of it.
        """
        found = {f"hidden/{name}": as_map(value, height, width) for name, value in self._found.items()}
        self._found.clear()
        return found

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if module.training:
                self._found[name] = output[0] if isinstance(output, tuple) else output

        return hook


def as_map(value: Tensor, height: int, width: int) -> Tensor:
    """Bring tokens (B, L, C) of an image into a map (B, C, h, w); maps stay, vectors (B, C) become 1x1.

    Tokens before those of the patches, such as that of a class, are left out.

    Args:
        value: The tokens, row by row.
        height: Height of the image; the map has its proportions.
        width: Width of it.
    """
    if value.ndim == 2:
        return value[:, :, None, None]
    if value.ndim == 4:
        return value
    count = value.shape[1]
    rows = int((count * height / width) ** 0.5 + 1e-6)
    columns = min(round(rows * width / height), count // rows)
    patches = value[:, count - rows * columns :]
    return patches.transpose(1, 2).unflatten(2, (rows, columns))


def _probe(dims: DenoiserDims, side: int) -> tuple[Tensor, Tensor, Cond]:
    def empty(*shape: int | None) -> Tensor | None:
        return None if None in shape else torch.zeros(*(each or 0 for each in shape), device="meta")

    x = torch.zeros(1, dims.sample, side, side, device="meta")
    t = torch.zeros((1,) if dims.times == 1 else (1, dims.times), device="meta")
    spatial = empty(1, dims.spatial, side, side) if dims.spatial else None
    return x, t, Cond(empty(1, 1, dims.tokens), None, empty(1, dims.vector), spatial)
