"""Exact versions in the place of aliases: what a command or a run was given from W&B stays what it was.

A run keeps the versions that it began with, in its artifacts.json: ``wandb:me/ldm/demo-clip:latest`` in its
command means the same one when it is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ldm.io.artifacts import is_reference, look_up
from ldm.io.atomic import write_text
from ldm.io.lock import waiting


def references(value: Any) -> Iterator[str]:
    """Yield the references among the values of nested settings, in order."""
    if isinstance(value, str) and is_reference(value):
        yield value
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping | Namespace):
        inner = (vars(value) if isinstance(value, Namespace) else value).values()
    elif isinstance(value, list | tuple):
        inner = value
    for item in inner:
        yield from references(item)


def pins(value: Any) -> dict[str, str]:
    """Look up the exact version of each reference among the values of nested settings."""
    return {text: str(look_up(text).reference) for text in dict.fromkeys(references(value))}


def pinned(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """Replace references in nested settings by exact ones.

    Args:
        value: The settings; not changed.
        known: Exact references; None looks them up.
    """
    known = pins(value) if known is None else known
    if not known:
        return value
    if isinstance(value, str):
        return known.get(value, value)
    if isinstance(value, Namespace):
        copy = value.clone()
        for name, item in vars(value).items():
            copy[name] = pinned(item, known)
        return copy
    if isinstance(value, dict):
        return {name: pinned(item, known) for name, item in value.items()}
    return [pinned(item, known) for item in value] if isinstance(value, list) else value


def pinned_for(run: Path, config: Namespace) -> Namespace:
    """Pin the references of a run: to the versions that it began with, which its artifacts.json lists.

    Args:
        run: Folder of the run.
        config: Its configuration.
    """
    wanted = list(dict.fromkeys(references(config)))
    if not wanted:
        return config
    run.mkdir(parents=True, exist_ok=True)
    record = run / "artifacts.json"
    with waiting(record.with_name(".artifacts.lock")):  # all processes of a run take what one of them found
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        for text in wanted:
            if text not in known:
                found = look_up(text)
                known[text] = {"exact": str(found.reference), "digest": found.digest}
        write_text(record, json.dumps(known, indent=2) + "\n")
    exact: Namespace = pinned(config, {text: entry["exact"] for text, entry in known.items()})
    return exact
