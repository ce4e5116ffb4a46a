"""Write checkpoints atomically: a crash at any moment leaves a complete one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from typing_extensions import override

from ldm.io.atomic import MARK, link, replacing, sync
from ldm.io.checkpoint import verify

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The newest checkpoint of a run, and the one before it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to the disk, and renames it.

    Lightning's own writer goes through the system's temporary folder: on another file system its last
    step is a copy, which can be cut short. What last.ckpt was before stays as previous.ckpt: a file that
    was written well may still be damaged later. One from before a validation does not: that from after it
    takes its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_provisional = False

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Callable[[], object] | None = None,
    ) -> None:
        """Write ``checkpoint`` to ``path``; on an error the earlier files stay as they were.

        Args:
            checkpoint: Tensors and primitives.
            path: The file.
            storage_options: Called once the file is there, e.g. to give it another name.

        Raises:
            OSError: If it cannot be written, e.g. because the disk is full.
        """
        self._save(checkpoint, Path(path), storage_options or (lambda: None))

    def finish(self) -> None:
        """Wait for what is still being written: nothing.

        Raises:
            OSError: If it cannot be written.
        """

    def _save(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], object]) -> None:
        self._write(checkpoint, path)
        then()

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"*.ckpt{MARK}*"):
            stale.unlink()  # of a process killed while it wrote
        try:
            with replacing(target) as temporary:
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                sync(temporary)
                if target.name == LAST and target.exists() and not self._is_provisional:
                    link(target, target.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:
            if (cause := _cause(error)) is None:
                raise
            raise OSError(f"checkpoint '{target}' cannot be written: {cause}") from error
        sync(target.parent)
        self._note(checkpoint, target)

    def _note(self, checkpoint: dict[str, Any], path: Path) -> None:
        if path.name == LAST:
            self._is_provisional = checkpoint.get("validation", {}).get("is_due", False)

    @override
    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a complete checkpoint; tensors and primitives only, unless ``weights_only`` is False.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds more than tensors and primitives.
        """
        verify(path)
        try:
            loaded: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only is not False)
        except Exception as error:
            raise ValueError(f"checkpoint '{path}' cannot be read: {str(error).splitlines()[0]}") from error
        self._note(loaded, Path(path))
        return loaded


def newest_complete(folder: Path) -> Path | None:
    """Find the newest undamaged checkpoint of a run: last.ckpt, else the one before, else the kept ones.

    Damaged ones are named on stderr.

    Args:
        folder: The run's folder of checkpoints.

    Returns:
        The file, or None if there is no checkpoint at all.

    Raises:
        ValueError: If all are damaged: starting afresh would overwrite what may still be saved.
    """
    kept = sorted(folder.glob("step=*.ckpt"), reverse=True)
    damages = []
    for path in (folder / LAST, folder / PREVIOUS, *kept):
        try:
            verify(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damages.append(str(error))
        else:
            for damage in damages:
                print(f"warning: {damage}; '{path}' is taken instead", file=sys.stderr, flush=True)
            return path
    if damages:
        raise ValueError(f"{'; '.join(damages)}; there is no earlier one: name another with --ckpt_path")
    return None


def _cause(error: BaseException | None) -> OSError | None:
    """Find the system's error behind torch's, which speaks of a position in the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
