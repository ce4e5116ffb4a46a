"""Where the captions of a folder of images come from: files beside them, or a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.fields import IMAGES

_OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "jfif", "tif", "tiff")


@dataclass(frozen=True)
class Item:
    """One image to pack.

    Args:
        name: Path relative to the folder, with forward slashes.
        caption: Its caption, not empty; None without captions.
        label: Its class, >= 0; None without classes.
    """

    name: str
    caption: str | None = None
    label: int | None = None


@dataclass
class Skipped:
    """What could not be used, by reason."""

    files: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Note a file."""
        self.files.setdefault(reason, []).append(name)

    def summary(self) -> str:
        """Say in one line how many files were skipped and why; empty if none was."""
        if not self.files:
            return ""
        reasons = [f"{len(names)} {reason} (first: {names[0]})" for reason, names in self.files.items()]
        return f"; skipped {sum(map(len, self.files.values()))}: {', '.join(reasons)}"

    def listing(self) -> str:
        """List each file with its reason, one per line."""
        return "".join(f"{reason}\t{name}\n" for reason, names in self.files.items() for name in names)


def images_only(folder: Path, skipped: Skipped) -> list[Item]:
    """List all images of a folder and its subfolders, without captions."""
    return [Item(name) for name in _images(folder, skipped)]


def from_folder(folder: Path, skipped: Skipped) -> list[Item]:
    """List the images of a folder and its subfolders that have a caption in a .txt file beside them."""
    items = []
    for name in _images(folder, skipped):
        caption_file = (folder / name).with_suffix(".txt")
        if not caption_file.is_file():
            skipped.add("without a .txt file beside it", name)
            continue
        try:
            caption = caption_file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            skipped.add("with a caption that is not UTF-8", name)
            continue
        if caption:
            items.append(Item(name, caption))
        else:
            skipped.add("with an empty caption", name)
    return items


def from_table(table: Path, folder: Path, skipped: Skipped) -> list[Item]:
    """List the images that a CSV (with header) or JSONL file names with their captions.

    Raises:
        FileNotFoundError: If the table is missing.
        ValueError: If it is neither CSV nor JSONL, or lacks a column, or a line of it cannot be read.
    """
    if not table.is_file():
        raise FileNotFoundError(
            f"--captions: '{table}' is not a file (expected CSV, JSONL, 'beside' or 'none')"
        )
    items: list[Item] = []
    seen: set[str] = set()
    for row in _rows(table):
        name = Path(str(row["file"])).as_posix()
        problem = _problem(name, row, folder, seen)
        if problem:
            skipped.add(problem, name)
            continue
        seen.add(name)
        label = row.get("label")
        items.append(Item(name, row["caption"].strip(), None if label in (None, "") else int(label)))
    return items


def _problem(name: str, row: dict[str, Any], folder: Path, seen: set[str]) -> str | None:
    label = row.get("label")
    if name in seen:
        return "named twice in the table"
    if Path(name).suffix[1:].lower() not in IMAGES:
        return "of another format"
    if not (folder / name).is_file():
        return "missing"
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        return "with an empty caption"
    if label not in (None, "") and not str(label).isdecimal():
        return "with a label that is no integer >= 0"
    return None


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if table.suffix.lower() not in readers:
        raise ValueError(f"--captions: '{table}' ends in '{table.suffix}', expected .csv or .jsonl")
    try:
        for line, row in readers[table.suffix.lower()](table):
            lacking = [name for name in ("file", "caption") if name not in row]
            if lacking:
                raise ValueError(f"{table}, line {line}: has {list(row)}, expected also {lacking}")
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: is not UTF-8 ({error.reason} at byte {error.start})") from error


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, {str(name): value for name, value in row.items()}


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{table}, line {line}: is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{table}, line {line}: is a {type(row).__name__}, expected an object")
            yield line, row


def _images(folder: Path, skipped: Skipped) -> list[str]:
    names = []
    for path in sorted(folder.rglob("*")):
        kind, name = path.suffix[1:].lower(), path.relative_to(folder).as_posix()
        if path.name.startswith(".") or not path.is_file():
            continue
        if kind in IMAGES:
            names.append(name)
        elif kind in _OTHER_IMAGES:
            skipped.add("of another format", name)
    return names
