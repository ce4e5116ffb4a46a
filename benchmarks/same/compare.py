"""What is compared: files, metrics, weights and images of two folders; the first difference is named."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TIMES = (
    "train/images_per_second",
    "train/images_per_second_per_device",
    "train/data_wait",
    "train/step_seconds",
)
"""Columns of metrics.csv that are left out: how long something took."""
RENAMED_METRICS: dict[str, str] = {}
"""Columns of metrics.csv and values of evaluation.json, by their name in BEFORE: their name in AFTER."""

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Found:
    """What a comparison found.

    Args:
        size: How much was compared.
        difference: The first one, with its position and the two values; None if all is equal.
    """

    size: str
    difference: str | None = None


def compare_files(before: Path, after: Path, pattern: str = "*.tar") -> Found:
    """Compare files of two folders byte by byte."""
    names, difference = _names(before, after, pattern)
    for name in names:
        one, other = (before / name).read_bytes(), (after / name).read_bytes()
        if one != other and difference is None:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), "its end")
            difference = f"{before / name}, byte {at}: {len(one)} and {len(other)} bytes, not the same"
    return Found(f"{len(names)} files", difference)


def compare_images(before: Path, after: Path) -> Found:
    """Compare PNG files of two folders pixel by pixel; what else the files say does not count."""
    names, difference = _names(before, after, "*.png")
    for name in names:
        one, other = (torch.from_numpy(np.array(Image.open(side / name))) for side in (before, after))
        if difference is None and (unequal := first_unequal(one, other)):
            difference = f"{before / name}, {unequal}"
    return Found(f"{len(names)} images", difference)


def compare_metrics(before: Path, after: Path) -> Found:
    """Compare two metrics.csv: the same rows in order, the same columns in any order, the same text."""
    one, other = _read_csv(before, RENAMED_METRICS), _read_csv(after, {})
    columns = list(one[0]) if one else []
    return Found(f"{len(one)} x {len(columns)}", _difference_of_rows(before, one, other))


def compare_evaluations(before: Path, after: Path) -> Found:
    """Compare the values of two evaluation.json, to the last digit."""
    one, other = _read_evaluation(before, RENAMED_METRICS), _read_evaluation(after, {})
    return Found(f"{len(one)} x {len(one[0]) if one else 0}", _difference_of_rows(before, one, other))


def _difference_of_rows(path: Path, before: Rows, after: Rows) -> str | None:
    if not before:
        return f"{path}: no rows"
    columns, others = (list(rows[0]) if rows else [] for rows in (before, after))
    if unmatched := sorted(set(columns) ^ set(others)):
        side = "BEFORE" if unmatched[0] in columns else "AFTER"
        return f"{path}, column {unmatched[0]}: only in {side}"
    for number, (one, other) in enumerate(zip(before, after, strict=False), 1):
        for column in columns:
            if one[column] != other[column]:
                return f"{path}, row {number}, column {column}: {one[column]!r} and {other[column]!r}"
    return None if len(before) == len(after) else f"{path}: {len(before)} and {len(after)} rows"


def _read_csv(path: Path, names: Mapping[str, str]) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, restval="", strict=True))
    return [{names.get(k, k): v for k, v in row.items() if k not in TIMES} for row in rows]


def _read_evaluation(path: Path, names: Mapping[str, str]) -> Rows:
    """Read a row for each candidate."""
    results = json.loads(path.read_text())["results"]
    return [{names.get(v["name"], v["name"]): repr(v["value"]) for v in r["values"]} for r in results]


def compare_checkpoints(before: Path, after: Path) -> Found:
    """Compare all checkpoints of two folders, see ``compare_weights``."""
    names, difference = _names(before, after, "*.ckpt")
    sizes = []
    for name in names:
        one, other = (torch.load(s / name, map_location="cpu", weights_only=True) for s in (before, after))
        found = compare_weights(one, other)
        sizes.append(found.size)
        if difference is None and found.difference:
            difference = f"{before / name}, {found.difference}"
    return Found(f"{len(names)} x ({'; '.join(dict.fromkeys(sizes))})", difference)


def compare_weights(before: dict[str, Any], after: dict[str, Any]) -> Found:
    """Compare the tensors of two checkpoints bit for bit, NaN and the sign of zero included.

    Those of ``state_dict`` by their names, of ``optimizer_states`` by their order, and all others, such as
    the raw weights beside averaged ones, by their contents: names of callbacks may have changed.
    """
    named = [dict(tensors(side.get("state_dict", {}))) for side in (before, after)]
    ordered = [[t for _, t in tensors(side.get("optimizer_states", []))] for side in (before, after)]
    known = ("state_dict", "optimizer_states")
    rest = [dict(tensors({k: v for k, v in side.items() if k not in known})) for side in (before, after)]
    numbered = [{f"optimizer tensor {i}": t for i, t in enumerate(side)} for side in ordered]
    difference = _by_name(*named) or _by_name(*numbered) or _by_content(*rest)
    size = f"{len(named[0])} by name, {len(ordered[0])} of the optimizer, {len(rest[0])} others"
    return Found(size, difference or (None if named[0] else "no weights"))


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk through nested containers, and yield each tensor with its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors(part, f"{name}.{number}")


def _by_name(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    if unmatched := [n for n in [*before, *after] if not (n in before and n in after)]:
        return f"{unmatched[0]}: only in {'BEFORE' if unmatched[0] in before else 'AFTER'}"
    differences = ((name, first_unequal(before[name], after[name])) for name in before)
    return next((f"{name}, {difference}" for name, difference in differences if difference), None)


def _by_content(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    counts = [Counter(fingerprint(t) for t in side.values()) for side in (before, after)]
    for side, one, other in (
        ("BEFORE", before, counts[0] - counts[1]),
        ("AFTER", after, counts[1] - counts[0]),
    ):
        if unmatched := [name for name, tensor in one.items() if fingerprint(tensor) in other]:
            return (
                f"{unmatched[0]} in {side}: no tensor of the other equals it, nor {len(unmatched) - 1} more"
            )
    return None


def fingerprint(tensor: Tensor) -> str:
    """Return SHA-256 of dtype, shape and bits."""
    return hashlib.sha256(
        f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bits(tensor).tobytes()
    ).hexdigest()


def first_unequal(before: Tensor, after: Tensor) -> str | None:
    """Name the first element whose bits differ, with both values."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (before, after)]
        return f"{kinds[0]} and {kinds[1]}"
    unequal = np.flatnonzero(_bits(before) != _bits(after))
    if not len(unequal):
        return None
    position = int(unequal[0]) // before.element_size()
    values = [tensor.flatten()[position].item() for tensor in (before, after)]
    return f"element {position} of {before.numel()}: {values[0]!r} and {values[1]!r}"


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def _names(before: Path, after: Path, pattern: str) -> tuple[list[str], str | None]:
    """List the files that both folders have, and name the first that one lacks."""
    sets = [{path.name for path in side.glob(pattern)} for side in (before, after)]
    unmatched = sorted(sets[0] ^ sets[1])
    difference = None if any(sets) else f"{before / pattern}: no such files"
    if unmatched:
        side = "BEFORE" if unmatched[0] in sets[0] else "AFTER"
        difference = f"{before / unmatched[0]}: only in {side}"
    return sorted(sets[0] & sets[1]), difference
