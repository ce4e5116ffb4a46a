"""Read what an earlier stage left: a checkpoint carries its own class and arguments.

A checkpoint's ``config`` is ``{"class_path": ..., "init_args": {...}}`` of the stage, its
``state_dict`` holds the averaged weights where the run averaged them, ``stage`` is its name.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def find(path: str | Path) -> Path:
    """Resolve a checkpoint file or a run folder (its newest checkpoint) to the file.

    Raises:
        FileNotFoundError: If there is none; the message says where it was looked for.
    """
    path = Path(path)
    if path.is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    found = "is a folder without checkpoints/last.ckpt" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"checkpoint '{path}' {found}: expected a .ckpt file or the folder of a run")


def read(path: str | Path, stage: str | None = None) -> dict[str, Any]:
    """Read a checkpoint safely (tensors and primitives only).

    Args:
        path: Checkpoint file or run folder.
        stage: Name of the stage that must have written it, or None for any.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged, not one of ours, or of another stage.
    """
    file = find(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint '{file}' cannot be read: {str(error).splitlines()[0]}") from error
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if found is None or checkpoint.get("config") is None:
        raise ValueError(f"checkpoint '{file}' was not written by a stage of ldm.fit: it names no stage")
    if stage is not None and found != stage:
        raise ValueError(f"checkpoint '{file}' is of stage '{found}', expected stage '{stage}'")
    return checkpoint


def sha256(path: str | Path) -> str:
    """Hash a checkpoint file, as hexadecimal digits."""
    with find(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def instantiate(config: Mapping[str, Any], expected: type[M]) -> M:
    """Build ``{"class_path": ..., "init_args": {...}}`` of an ``expected`` class; arguments are plain values.

    Raises:
        ValueError: If it names another class: a checkpoint must not be able to call whatever it likes.
    """
    module, _, name = config["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise ValueError(f"checkpoint names the class {config['class_path']}, expected a {expected.__name__}")
    return found(**(config.get("init_args") or {}))


def load_net(path: str | Path, stage: str, expected: type[M]) -> tuple[M, dict[str, Any]]:
    """Rebuild the ``net`` of a stage's checkpoint, with averaged weights where it has them.

    Args:
        path: Checkpoint file or run folder.
        stage: Name of the stage that must have written it.
        expected: Class of the network.

    Returns:
        The network, strictly loaded, and the checkpoint.
    """
    state = read(path, stage)
    return build_net(state, expected), state


def build_net(state: Mapping[str, Any], expected: type[M]) -> M:
    """Rebuild the ``net`` of a stage whose checkpoint is read already; see ``load_net``."""
    net = instantiate(state["config"]["init_args"]["net"], expected)
    weights: Mapping[str, Tensor] = state["state_dict"]
    net.load_state_dict({k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")})
    return net
