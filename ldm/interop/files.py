"""Folders and settings, as other programs read and write them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.cli import version
from ldm.io import checkpoint as ckpt
from ldm.io.atomic import unfinished, write_text


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist")
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


def record(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Say what produced an export: what its ldm.json holds.

    Args:
        checkpoint: What ``ldm.io.checkpoint.read`` returned.
        path: The checkpoint file or run folder that it was read from.
    """
    return {
        "software": f"ldm {version()}",
        "source": str(path),
        "sha256": ckpt.sha256(path),
        "stage": checkpoint["stage"],
        "weights": checkpoint.get("weights", "raw"),
        "samples_seen": ckpt.progress(checkpoint).samples,
        "image_size": checkpoint.get("image_size"),
        "upstream": checkpoint.get("upstream", {}),
        "config": checkpoint["config"],
    }


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write an export to, which becomes ``out`` when it is whole.

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
