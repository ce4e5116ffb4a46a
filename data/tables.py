"""Tables of captions: CSV, TSV, JSONL or Parquet, and the metadata files of Hugging Face's ImageFolder."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from data import parquet
from data.items import (
    NOT_IN_TABLE,
    PACKED,
    Item,
    Skipped,
    composed,
    images_among,
    list_files,
    other_format,
    suffix,
)

FILE = ("file", "file_name", "filename", "image", "path")
CAPTION = ("caption", "text", "prompt")
TABLES = {".csv": ",;\t|", ".tsv": "\t", ".jsonl": "", ".parquet": ""}
"""Kinds of tables, with the separators of their columns."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def from_table(table: Path, folder: Path, columns: Sequence[str], skipped: Skipped) -> list[Item]:
    """List the images that a table names, relative to the folder, with their captions.

    Args:
        table: CSV or TSV with a header, JSONL or Parquet.
        folder: Folder of its relative paths.
        columns: Columns of file, caption and, if there are three, label; none takes the usual names.
        skipped: Receives files that cannot be used.

    Raises:
        FileNotFoundError: If the table is missing.
        ValueError: If it is of another kind, lacks a column, or a line of it cannot be read.
    """
    if not table.is_file():
        raise FileNotFoundError(
            f"--captions: '{table}' is not a file (expected CSV, TSV, JSONL, Parquet, 'txt', 'folders', ...)"
        )
    return _items([(table, "")], folder, columns, skipped)


def from_metadata(folder: Path, columns: Sequence[str], skipped: Skipped) -> list[Item]:
    """List the images that the metadata files of a folder and its subfolders name, each relative to itself.

    Raises:
        ValueError: As ``from_table``.
    """
    names = metadata_among(list_files(folder, Skipped()))
    return _items([(folder / name, name.rpartition("/")[0]) for name in names], folder, columns, skipped)


def metadata_among(files: Sequence[str]) -> list[str]:
    """List the metadata files, one a folder: where there are several kinds, the first of ``METADATA``."""
    found: dict[str, str] = {}
    for kind in METADATA:
        for name in files:
            if name.rpartition("/")[2].lower() == kind:
                found.setdefault(name.rpartition("/")[0], name)
    return [found[below] for below in sorted(found)]


def _items(
    tables: Sequence[tuple[Path, str]], folder: Path, columns: Sequence[str], skipped: Skipped
) -> list[Item]:
    """List the images of tables, each with the folder that its names are relative to."""
    images = images_among(list_files(folder, skipped), skipped)
    on_disk = {composed(name): name for name in images}
    items: dict[str, Item] = {}
    named: set[str] = set()
    for table, below in tables:
        for found, caption, label in _rows(table, columns):
            name = Path(below, str(found)).as_posix()
            if not (folder / name).is_file():
                name = on_disk.get(composed(name), name)
            problem = "named twice in the table" if name in items else _problem(folder / name, caption, label)
            named.add(name)
            if problem:
                skipped.add(problem, name)
            else:
                items[name] = Item(name, caption.strip(), None if label in (None, "") else int(label))
    for name in images:
        if name not in named:
            skipped.add(NOT_IN_TABLE, name)
    return list(items.values())


def _problem(path: Path, caption: Any, label: Any) -> str | None:
    if suffix(path.name) not in PACKED:
        return other_format(suffix(path.name))
    if not path.is_file():
        return "missing"
    return caption_problem(caption) or label_problem(label)


def caption_problem(caption: Any) -> str | None:
    """Return why a caption of a table cannot be used; None if it can."""
    return None if isinstance(caption, str) and caption.strip() else "with an empty caption"


def label_problem(label: Any) -> str | None:
    """Return why a label of a table cannot be used; None if it can, or there is none."""
    is_good = label in (None, "") or str(label).isdecimal()
    return None if is_good else "with a label that is no integer >= 0"


def find_columns(
    found: Collection[str], columns: Sequence[str], file: Sequence[str] = FILE
) -> list[str | None]:
    """Find the columns of file, caption and label: those that are named, or else the usual ones."""
    names: list[Sequence[str]] = [(name,) for name in columns] or [file, CAPTION, ("label",)]
    columns_found = [next((name for name in usual if name in found), None) for usual in names]
    return [*columns_found, None][:3]


def _rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield file, caption and label (None without one) of each line."""
    separators = TABLES.get(table.suffix.lower())
    if separators is None:
        raise ValueError(
            f"--captions: '{table}' ends in '{table.suffix}', expected {', '.join(TABLES)}, "
            "or one of 'txt', 'folders', 'none'"
        )
    try:
        for line, row in _lines(table, separators, columns):
            file, caption, label = find_columns(row, columns)
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


def _lines(table: Path, separators: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if separators:
        return _csv_rows(table, separators, columns)
    return _jsonl_rows(table) if table.suffix.lower() == ".jsonl" else enumerate(parquet.rows(table), 1)


def _csv_rows(table: Path, separators: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        names = {c: next(csv.reader([header], delimiter=c), []) for c in separators}
        fitting = [c for c, found in names.items() if None not in find_columns(found, columns)[:2]]
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
