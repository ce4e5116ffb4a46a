"""JSON objects as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.io.atomic import write_text
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
