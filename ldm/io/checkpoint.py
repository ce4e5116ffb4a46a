"""Read what an earlier stage left: a checkpoint carries its own class and arguments.

A checkpoint's ``config`` is ``{"class_path": ..., "init_args": {...}}`` of the stage, its
``state_dict`` holds the averaged weights where the run averaged them, ``stage`` is its name.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import ldm.io.weights
from ldm.types import Progress

M = TypeVar("M", bound=nn.Module)

_WHOLE: set[tuple[int, ...]] = set()
"""Files that were found undamaged, by device, inode, size and time."""


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
    check_whole(file)
    return _checked(_load(file), file, stage)


def peek(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself; its tensors are mapped, and read only where they are looked at.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read or is not one of ours.
    """
    file = find(path)
    return _checked(_load(file, mmap=True), file, None)


def _load(file: Path, mmap: bool = False) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(f"checkpoint '{file}' cannot be read: {str(error).splitlines()[0]}") from error


def _checked(checkpoint: Any, file: Path, stage: str | None) -> dict[str, Any]:
    found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
    if found is None or checkpoint.get("config") is None:
        raise ValueError(f"checkpoint '{file}' was not written by a stage of ldm.fit: it names no stage")
    if stage is not None and found != stage:
        raise ValueError(f"checkpoint '{file}' is of stage '{found}', expected stage '{stage}'")
    whole: dict[str, Any] = checkpoint
    return whole


def check_whole(path: str | os.PathLike[str]) -> None:
    """Compare every part of a checkpoint with its checksum: torch writes them, but reads without a look.

    A file is checked once per process.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a part is missing or altered; the message names the file and the part.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    now = os.stat(path)
    identity = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if identity in _WHOLE:
        return
    try:
        with zipfile.ZipFile(path) as parts:
            altered = parts.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"checkpoint '{path}' cannot be read: {error}, expected a whole file") from error
    if altered is not None:
        raise ValueError(f"checkpoint '{path}' cannot be read: the checksum of its part '{altered}' is wrong")
    _WHOLE.add(identity)


def progress(checkpoint: Mapping[str, Any]) -> Progress:
    """Return the optimizer steps and samples that a checkpoint was trained for.

    Raises:
        ValueError: If the checkpoint does not say.
    """
    if "progress" not in checkpoint:
        raise ValueError("checkpoint has no 'progress': an ldm older than this one wrote it, train it again")
    return Progress(**checkpoint["progress"])


def sha256(path: str | Path) -> str:
    """Hash a checkpoint file, as hexadecimal digits."""
    return ldm.io.weights.sha256(find(path))


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
