"""Folders that an export writes, with a record of what it was made from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.io.atomic import sweep, unfinished
from ldm.io.checkpoint import Checkpoint


def record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Contents of an export's ldm.json: the checkpoint that it was made from."""
    return {
        "software": f"ldm {__version__}",
        "source": str(checkpoint.file),
        "sha256": checkpoint.sha256,
        "stage": checkpoint.stage,
        "weights": checkpoint.weights,
        "samples_seen": checkpoint.progress.samples,
        "image_size": checkpoint.state.get("image_size"),
        "upstream": checkpoint.upstream,
        "config": checkpoint.state["config"],
    }


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder for an export, which becomes ``out`` when it is complete.

    Raises:
        ValueError: If ``out`` has files: nothing is written over.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: '{out}' is there already, expected an empty folder or none")
    sweep(out.parent, out.name)
    temporary = unfinished(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
