"""Images of a folder with their captions: from .txt files, names of folders, a table, or Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import parquet
from data.items import Item, Skipped, images_among, list_files, stem, suffix
from data.tables import (
    TABLES,
    caption_problem,
    find_columns,
    from_metadata,
    from_table,
    label_problem,
    metadata_among,
)

TEXTS = ("txt", "caption")
"""Suffixes of captions beside images, the preferred one first; kohya's scripts write .caption."""


@dataclass(frozen=True)
class Collection:
    """What a folder holds.

    Args:
        items: The images that can be packed, unless they turn out to be damaged.
        classes: Names of the classes by their labels; none if they are not known.
    """

    items: list[Item]
    classes: Sequence[str] = ()


def images_only(folder: Path, columns: Sequence[str], skipped: Skipped) -> Collection:
    """List all images of a folder and its subfolders, without captions."""
    files = list_files(folder, skipped)
    images = images_among(files, skipped)
    if images or not _tables_with_images(folder, files, columns):
        return Collection([Item(name) for name in images])
    found = from_parquet(folder, columns, skipped, needs_captions=False)
    return Collection([Item(item.name, None, None, item.row) for item in found.items])


def from_texts(folder: Path, columns: Sequence[str], skipped: Skipped) -> Collection:
    """List the images of a folder and its subfolders with a caption in a .txt file of the same name."""
    files, items = list_files(folder, skipped), []
    texts: dict[str, str] = {}
    for kind in TEXTS:
        for name in files:
            if suffix(name) == kind:
                texts.setdefault(stem(name), name)
    for name in images_among(files, skipped):
        if stem(name) not in texts:
            skipped.add("without a .txt file", name)
            continue
        try:
            caption = (folder / texts[stem(name)]).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            skipped.add("with a caption that is not UTF-8", name)
        except OSError as error:
            skipped.add("with a caption that cannot be read", f"{name} ({error.strerror})")
        else:
            if caption:
                items.append(Item(name, caption))
            else:
                skipped.add("with an empty caption", name)
    return Collection(items)


def from_classes(folder: Path, columns: Sequence[str], skipped: Skipped) -> Collection:
    """List the images of a folder of classes: the first subfolder of each names its caption and class."""
    names = images_among(list_files(folder, skipped), skipped)
    labels = {name: label for label, name in enumerate(class_names(names))}
    items = []
    for name in names:
        kind, is_below, _ = name.partition("/")
        if is_below:
            items.append(Item(name, kind.replace("_", " "), labels[kind]))
        else:
            skipped.add("in no folder of a class", name)
    return Collection(items, list(labels))


def class_names(names: Sequence[str]) -> list[str]:
    """List the first subfolders of images, sorted: the position of one is its label."""
    return sorted({name.partition("/")[0] for name in names if "/" in name})


def from_parquet(
    folder: Path, columns: Sequence[str], skipped: Skipped, needs_captions: bool = True
) -> Collection:
    """List the images in the rows of Parquet files.

    Without a column of captions the names of the classes are the captions, where the file has them.

    Args:
        folder: Folder of the files, searched with its subfolders.
        columns: Columns of the image's bytes, caption and perhaps label; none takes the usual names.
        skipped: Receives rows that cannot be used.
        needs_captions: Whether files need a column of captions or of classes.

    Raises:
        ValueError: If a file cannot be read, or lacks the columns.
    """
    items, classes = [], list[str]()
    for name in _tables_with_images(folder, list_files(folder, skipped), columns):
        names = list(next(parquet.rows(folder / name), {}))
        _, text, label = find_columns(names, columns)
        classes = (parquet.class_labels(folder / name, label) if label else []) or classes
        if needs_captions and text is None and not classes:
            wanted = " and ".join(columns[1:2]) or "caption, text or prompt"
            raise ValueError(
                f"{folder / name}: has the columns {', '.join(names)}, expected {wanted}: see --columns"
            )
        for row, values in enumerate(parquet.rows(folder / name)):
            item = Item(f"{name}/{row}", row=row)
            caption, kind = values.get(text or ""), values.get(label or "")
            problem = label_problem(kind)
            if text is None and not problem and kind is not None and int(kind) < len(classes):
                caption = classes[int(kind)].replace("_", " ")
            if needs_captions:
                problem = problem or caption_problem(caption)
            if problem:
                skipped.add(problem, item.name)
            else:
                words = caption.strip() if isinstance(caption, str) else None
                items.append(Item(item.name, words, None if kind in (None, "") else int(kind), row))
    return Collection(items, classes)


def _tables_with_images(folder: Path, files: Sequence[str], columns: Sequence[str]) -> list[str]:
    tables = [name for name in files if suffix(name) == "parquet"]
    return [name for name in tables if parquet.image_column(folder / name, columns) is not None]


WAYS: dict[str, Callable[[Path, Sequence[str], Skipped], Collection]] = {
    "txt": from_texts,
    "folders": from_classes,
    "none": images_only,
    "metadata": lambda *given: Collection(from_metadata(*given)),
    "parquet": from_parquet,
}
"""Values of --captions other than a table."""


def chosen(folder: Path, captions: str, columns: Sequence[str]) -> str:
    """Return the value of --captions that "auto" stands for in a folder; others stay as they are."""
    if captions != "auto":
        return captions
    files = list_files(folder, Skipped())
    if metadata_among(files):
        return "metadata"
    if not images_among(files, Skipped()) and _tables_with_images(folder, files, columns):
        return "parquet"
    return "txt"


def find(folder: Path, captions: str, columns: Sequence[str], skipped: Skipped) -> Collection:
    """List what can be packed of a folder.

    Raises:
        FileNotFoundError: If the table is missing.
        ValueError: If there is nothing, or the table cannot be read.
    """
    if captions in WAYS:
        found = WAYS[captions](folder, columns, skipped)
    else:
        found = Collection(from_table(Path(captions), folder, columns, skipped))
    if not found.items:
        what = f"skipped {skipped.counts()}" if skipped else "no jpg, jpeg, png or webp"
        raise ValueError(
            f"--images: nothing to pack in '{folder}', {what}{_advice(folder, captions, skipped)}"
        )
    return found


def _advice(folder: Path, captions: str, skipped: Skipped) -> str:
    """Suggest a value of --captions, or names of files in the table, where nothing can be packed."""
    if captions != "txt":
        return _renamed(folder, skipped)
    for table in sorted(folder.glob("*")):
        if table.suffix.lower() in TABLES:
            return f". There is {table.name}: try --captions {table}"
    if class_names(images_among(list_files(folder, Skipped()), Skipped())):
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
