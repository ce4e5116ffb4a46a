"""Positions of patches on a grid of any height and width, fixed: sines and cosines, or rotations."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10_000.0
"""Period of the slowest wave over that of the fastest."""


@lru_cache(maxsize=32)
def sincos_2d(height: int, width: int, dim: int, grid: float | None, device: torch.device) -> Tensor:
    """Embed the positions of patches in sines and cosines, half of them of the column, half of the row.

    Peebles & Xie 2023 (arXiv:2212.09748, sec. 3.2) take these from the vision transformer of He et al. 2021
    (arXiv:2111.06377).

    Args:
        height: Patches from top to bottom.
        width: Patches from left to right.
        dim: Width of the embedding, a multiple of 4.
        grid: Side of the grid that positions are interpolated to; None: positions are 0, 1, 2, ...
        device: Where the result lies.

    Returns:
        (height * width, dim) float32, row by row.
    """
    parts = [torch.cat([a.sin(), a.cos()], 1) for a in _angles(height, width, dim // 4, grid)]
    return _plain(torch.cat(parts, 1).float(), device)


@lru_cache(maxsize=32)
def rotary_2d(height: int, width: int, dim: int, grid: float | None, device: torch.device) -> Tensor:
    """Find the rotations of queries and keys: half of their pairs turn with the column, half with the row.

    Su et al. 2021 (arXiv:2104.09864), Eq. 34, for two axes, as in Heo et al. 2024 (arXiv:2403.13298).

    Args:
        height: Patches from top to bottom.
        width: Patches from left to right.
        dim: Width of a head, a multiple of 4.
        grid: As in ``sincos_2d``.
        device: Where the result lies.

    Returns:
        (2, height * width, dim / 2) float32: cosines and sines of the angles.
    """
    angles = torch.cat(_angles(height, width, dim // 4, grid), 1)
    return _plain(torch.stack([angles.cos(), angles.sin()]).float(), device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of entries by the angles of their positions; lengths and, of two, relative angles stay.

    Args:
        x: (B, heads, N, d): queries or keys. Entries i and i + d / 2 are a pair.
        rotation: (2, N, d / 2) of ``rotary_2d``.

    Returns:
        (B, heads, N, d) in the dtype of ``x``; computed in float32 or better.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _angles(height: int, width: int, count: int, grid: float | None) -> tuple[Tensor, Tensor]:
    """Return the angles of column and row, (height * width, count) float64 each."""
    rows, columns = (_coordinates(length, grid) for length in (height, width))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    frequencies = 1 / BASE ** (torch.arange(count, dtype=torch.float64, device="cpu") / count)
    angles = [torch.outer(each.flatten().double(), frequencies) for each in (column, row)]
    return angles[0], angles[1]


def _coordinates(length: int, grid: float | None) -> Tensor:
    index = torch.arange(length, dtype=torch.float32, device="cpu")
    return index if grid is None else index / (length / grid)


def _plain(table: Tensor, device: torch.device) -> Tensor:
    """Move a table; one that was made while sampling must serve training as well."""
    with torch.inference_mode(False):
        return table.clone().to(device)
