"""Captions of a folder of images: from .txt files, names of folders, or a table."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.fields import IMAGES

_OTHER_IMAGES = {"avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "tif", "tiff"}
_FILE = ("file", "file_name", "filename", "image", "path")
_CAPTION = ("caption", "text", "prompt")
_TABLES = {".csv": ",;\t|", ".tsv": "\t", ".jsonl": ""}
"""Kinds of tables, with the separators of their columns."""


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
    """Files that cannot be used, by reason."""

    files: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Note a file."""
        self.files.setdefault(reason, []).append(name)

    def counts(self) -> str:
        """Return the number of skipped files by reason in one line, empty if there are none."""
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.files.items())

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))

    def listing(self) -> str:
        """List each file with its reason, one per line."""
        return "".join(f"{reason}\t{name}\n" for reason, names in self.files.items() for name in names)


def images_only(folder: Path, skipped: Skipped) -> list[Item]:
    """List all images of a folder and its subfolders, without captions."""
    return [Item(name) for name in _images(_files(folder, skipped), skipped)]


def from_folder(folder: Path, skipped: Skipped) -> list[Item]:
    """List the images of a folder and its subfolders with a caption in a .txt file of the same name."""
    files, items = _files(folder, skipped), []
    texts = {_stem(name): name for name in files if name.lower().endswith(".txt")}
    for name in _images(files, skipped):
        if _stem(name) not in texts:
            skipped.add("without a .txt file", name)
            continue
        try:
            caption = (folder / texts[_stem(name)]).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            skipped.add("with a caption that is not UTF-8", name)
            continue
        if caption:
            items.append(Item(name, caption))
        else:
            skipped.add("with an empty caption", name)
    return items


def from_classes(folder: Path, skipped: Skipped) -> list[Item]:
    """List the images of a folder of classes: the first subfolder of each names its caption and class."""
    names = _images(_files(folder, skipped), skipped)
    labels = {name: label for label, name in enumerate(class_names(names))}
    items = []
    for name in names:
        kind, is_below, _ = name.partition("/")
        if is_below:
            items.append(Item(name, kind.replace("_", " "), labels[kind]))
        else:
            skipped.add("in no folder of a class", name)
    return items


def class_names(names: Sequence[str]) -> list[str]:
    """List the first subfolders of images, sorted: the position of one is its label."""
    return sorted({name.partition("/")[0] for name in names if "/" in name})


def from_table(table: Path, folder: Path, columns: Sequence[str], skipped: Skipped) -> list[Item]:
    """List the images that a table names with their captions.

    Args:
        table: CSV or TSV with a header, or JSONL.
        folder: Folder of its relative paths.
        columns: Columns of file, caption and, if there are three, label; none takes the usual names.
        skipped: Receives files that cannot be used.

    Raises:
        FileNotFoundError: If the table is missing.
        ValueError: If it is of another kind, lacks a column, or a line of it cannot be read.
    """
    if not table.is_file():
        raise FileNotFoundError(
            f"--captions: '{table}' is not a file (expected CSV, TSV, JSONL, 'txt', 'folders' or 'none')"
        )
    images = _images(_files(folder, skipped), skipped)
    on_disk = {_composed(name): name for name in images}
    items: dict[str, Item] = {}
    named: set[str] = set()
    for found, caption, label in _rows(table, columns):
        name = Path(str(found)).as_posix()
        if not (folder / name).is_file():
            name = on_disk.get(_composed(name), name)
        problem = "named twice in the table" if name in items else _problem(folder / name, caption, label)
        named.add(name)
        if problem:
            skipped.add(problem, name)
        else:
            items[name] = Item(name, caption.strip(), None if label in (None, "") else int(label))
    for name in images:
        if name not in named:
            skipped.add("not named in the table", name)
    return list(items.values())


def advice(folder: Path, captions: str, skipped: Skipped) -> str:
    """Suggest a value of --captions, or names of files in the table, where nothing can be packed."""
    if captions != "txt":
        return _renamed(folder, skipped)
    for table in sorted(folder.glob("*")):
        if table.suffix.lower() in _TABLES:
            return f". There is {table.name}: try --captions {table}"
    if class_names(_images(_files(folder, Skipped()), Skipped())):
        return ". Are its subfolders classes, try --captions folders; without captions, --captions none"
    return ". Try --captions TABLE, or --captions none"


def _renamed(folder: Path, skipped: Skipped) -> str:
    """Say how a missing file would be named, if it is in the folder by the end of its path."""
    for name in skipped.files.get("missing", []):
        parts = Path(name).parts
        for start in range(1, len(parts)):
            if (folder / (end := Path(*parts[start:]))).is_file():
                return f". Name files relative to --images: {end.as_posix()}, not {name}"
    return ""


def _problem(path: Path, caption: Any, label: Any) -> str | None:
    if path.suffix[1:].lower() not in IMAGES:
        return _other(path.suffix[1:].lower())
    if not path.is_file():
        return "missing"
    if not isinstance(caption, str) or not caption.strip():
        return "with an empty caption"
    if label not in (None, "") and not str(label).isdecimal():
        return "with a label that is no integer >= 0"
    return None


def _rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield file, caption and label (None without one) of each line."""
    separators = _TABLES.get(table.suffix.lower())
    if separators is None:
        raise ValueError(
            f"--captions: '{table}' ends in '{table.suffix}', expected {', '.join(_TABLES)}, "
            "or one of 'txt', 'folders', 'none'"
        )
    try:
        for line, row in _csv_rows(table, separators, columns) if separators else _jsonl_rows(table):
            file, caption, label = _columns(row, columns)
            if file is None or caption is None:
                raise ValueError(
                    f"{table}, line {line}: has the columns {', '.join(row)}, expected "
                    f"{' and '.join(columns) or 'file and caption'}: see --columns"
                )
            yield row[file], row[caption], row.get(label or "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: is not UTF-8 (at byte {error.start}), save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{table}: cannot be read ({error})") from error


def _columns(found: Collection[str], columns: Sequence[str]) -> list[str | None]:
    """Find the columns of file, caption and label."""
    names: list[tuple[str, ...]] = [(name,) for name in columns] or [_FILE, _CAPTION, ("label",)]
    columns_found = [next((name for name in usual if name in found), None) for usual in names]
    return [*columns_found, None][:3]


def _csv_rows(table: Path, separators: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        names = {c: next(csv.reader([header], delimiter=c), []) for c in separators}
        fitting = [c for c, found in names.items() if None not in _columns(found, columns)[:2]]
        file.seek(0)
        reader = csv.DictReader(file, delimiter=(fitting or separators)[0])
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


def _files(folder: Path, skipped: Skipped) -> list[str]:
    """List the files of a folder and its subfolders, linked ones too, each once; hidden ones are left out."""
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        below = Path(root).relative_to(folder)
        if (real := os.path.realpath(root)) in seen:
            skipped.add("a folder that was entered by another name", below.as_posix())
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if os.path.exists(os.path.join(root, name)):
                found.append((below / name).as_posix())
            else:
                skipped.add("a link that leads nowhere", (below / name).as_posix())
    return found


def _images(files: Sequence[str], skipped: Skipped) -> list[str]:
    kinds = {name: Path(name).suffix[1:].lower() for name in files}
    for name, kind in kinds.items():
        if kind in _OTHER_IMAGES:
            skipped.add(_other(kind), name)
    return [name for name, kind in kinds.items() if kind in IMAGES]


def _other(kind: str) -> str:
    return f"of another format, {kind or 'without a suffix'}"


def _stem(name: str) -> str:
    """Return a path without its suffix, the same however its accents are written."""
    return _composed(name.rpartition(".")[0])


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
