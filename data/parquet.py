"""Parquet files, as Hugging Face and img2dataset write them: tables, and images in their columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from data.items import Item

IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Usual columns of the bytes of images; img2dataset names it by the format."""
ROWS = 32
"""Rows that are read at once: they bound the memory."""


def rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, without bytes of images.

    Raises:
        ValueError: If the file cannot be read.
        ModuleNotFoundError: If pyarrow is missing.
    """
    with _opened(table) as file:
        names = [field.name for field in file.schema_arrow if not holds_bytes(field.type)]
        for batch in file.iter_batches(1024, columns=names):
            yield from batch.to_pylist()


def image_column(table: Path, columns: Sequence[str] = ()) -> str | None:
    """Return the column of a Parquet file that holds the bytes of images; None if there is none.

    Args:
        table: The file.
        columns: Names of columns, that of the images first; none takes the usual ones, or else the first
            that holds bytes as Hugging Face stores images.
    """
    with _opened(table) as file:
        holding = [field for field in file.schema_arrow if holds_bytes(field.type)]
    names = [field.name for field in holding]
    wanted = [*columns[:1]] or [*IMAGE, *(each.name for each in holding if each.type.num_fields)]
    return next((name for name in wanted if name in names), None)


def class_labels(table: Path, column: str) -> list[str]:
    """Return the names of the classes of a column, as Hugging Face stores them; none if it does not."""
    with _opened(table) as file:
        about = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(about)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]


def contents(folder: Path, items: Sequence[Item], columns: Sequence[str]) -> Iterator[tuple[Item, bytes]]:
    """Yield the bytes of images that lie in Parquet files; empty where a row has none.

    Args:
        folder: Folder of the files.
        items: The images, in the order of their files and rows.
        columns: As for ``image_column``.
    """
    for name, found in groupby(items, key=lambda item: item.file):
        wanted = {item.row: item for item in found}
        column = str(image_column(folder / name, columns))
        with _opened(folder / name) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if any(row in wanted for row in range(start, end)):
                    for row, content in enumerate(_bytes(file, group, column), start):
                        if row in wanted:
                            yield wanted[row], content
                start = end


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds bytes, alone or with their path as Hugging Face stores images."""
    import pyarrow.types as types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_bytes(kind.field(index).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _bytes(file: Any, group: int, column: str) -> Iterator[bytes]:
    for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column]):
        for value in batch.column(0).to_pylist():
            yield (value.get("bytes") if isinstance(value, dict) else value) or b""


def _opened(table: Path) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as files
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{table}: Parquet files are read by pyarrow, which is missing: pip install 'ldm[parquet]'"
        ) from error
    try:
        return files.ParquetFile(table)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{table}: cannot be read as Parquet ({str(error).splitlines()[0]:.150})") from error
