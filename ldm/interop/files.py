"""Folders and settings, as other programs read and write them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.io.atomic import unfinished, write_text
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import recognise


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist")
    recognise(path, f"'{path}'")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a {type(found).__name__}, expected a JSON object")
    return found


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically; its folder is made."""
    write_text(Path(path), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    temporary = unfinished(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
