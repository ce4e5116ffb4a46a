"""Files of weights that metrics measure with, and the hashes that name them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def sha256(path: str | Path) -> str:
    """Hash a file, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by names, shapes, dtypes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from a pickle of tensors of which nothing is run.

    ``{"state_dict": ...}`` around it and ``module.`` before every name are taken off.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: file '{path}' does not exist; nothing is downloaded")
    try:
        found = load_file(path) if Path(path).suffix == ".safetensors" else _unpickled(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights: file '{path}' cannot be read as tensors alone: {reason:.200}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"weights: file '{path}' holds {type(found).__name__}, expected a state dict of tensors"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def check_weights(path: str | Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check names and shapes.

    Raises:
        ValueError: If they differ; it counts both sides and names the first difference.
    """
    wrong = sorted(
        name for name in found.keys() | expected.keys() if _shape(found, name) != _shape(expected, name)
    )
    if wrong:
        one = wrong[0]
        raise ValueError(
            f"weights: file '{path}' has {len(found)} tensors, expected {len(expected)}: {len(wrong)} do not "
            f"fit, such as {one}: got {_shape(found, one)}, expected {_shape(expected, one)}"
        )


def _unpickled(path: str | Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
