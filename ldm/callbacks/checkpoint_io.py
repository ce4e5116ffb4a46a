"""Write checkpoints so that a crash at any moment leaves a whole one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to the disk, and renames it.

    Lightning's own writer goes through the system's temporary folder: on another file system its last
    step is a copy, which can be cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; on an error the earlier file stays as it was."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{target.name}.tmp-*"):
            stale.unlink()  # of a process killed while it wrote
        temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        try:
            write_through(temporary, lambda file: torch.save(checkpoint, file))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and primitives only, unless ``weights_only`` is False.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds more than tensors and primitives.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint '{path}' does not exist")
        try:
            loaded: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only is not False)
        except Exception as error:
            raise ValueError(f"checkpoint '{path}' cannot be read: {str(error).splitlines()[0]}") from error
        return loaded


def write_through(path: Path, write: Callable[[Any], object]) -> None:
    """Open ``path`` for bytes, call ``write`` with the file, and wait until the disk has it."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's names: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
