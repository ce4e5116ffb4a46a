"""Images to pack: what is listed of a folder, and what of it cannot be used."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data.fields import IMAGES

TWICE_ENTERED, NOT_IN_TABLE = "a folder that was entered by another name", "not named in the table"
NO_SAMPLES = (TWICE_ENTERED, NOT_IN_TABLE)
"""Reasons that make no bad sample: what is left out was not to be packed."""
_OTHER_IMAGES = {"avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl"}
PACKED = (*IMAGES, "tif", "tiff")
"""Suffixes of images that can be packed; TIFF becomes PNG."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack.

    Args:
        name: Path relative to the folder, with forward slashes; of a row of a Parquet file, that and the row.
        caption: Its caption, not empty; None without captions.
        label: Its class, >= 0; None without classes.
        row: Row of the Parquet file that holds it; None for a file of its own.
    """

    name: str
    caption: str | None = None
    label: int | None = None
    row: int | None = field(
        default=None, repr=False
    )  # the name has it, and manifests of before hash the rest

    @property
    def file(self) -> str:
        """Path of the file that holds it, relative to the folder."""
        return self.name if self.row is None else self.name.rpartition("/")[0]


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

    @property
    def bad(self) -> list[str]:
        """What is wrong with each bad sample."""
        ours = {reason: names for reason, names in self.files.items() if reason not in NO_SAMPLES}
        return [f"{name}: {reason}" for reason, names in ours.items() for name in names]

    def __len__(self) -> int:
        return sum(len(names) for names in self.files.values())

    def listing(self) -> str:
        """List each file with its reason, one per line."""
        return "".join(f"{reason}\t{name}\n" for reason, names in self.files.items() for name in names)


def list_files(folder: Path, skipped: Skipped) -> list[str]:
    """List the files of a folder and its subfolders, linked ones too, each once; hidden ones are left out."""
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        below = Path(root).relative_to(folder)
        if (real := os.path.realpath(root)) in seen:
            skipped.add(TWICE_ENTERED, below.as_posix())
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


def images_among(files: Sequence[str], skipped: Skipped) -> list[str]:
    """List those of the files that can be packed; images of other formats are noted."""
    kinds = {name: suffix(name) for name in files}
    for name, kind in kinds.items():
        if kind in _OTHER_IMAGES:
            skipped.add(other_format(kind), name)
    return [name for name, kind in kinds.items() if kind in PACKED]


def other_format(kind: str) -> str:
    """Return the reason why a file with this suffix is left out."""
    return f"of another format, {kind or 'without a suffix'}"


def suffix(name: str) -> str:
    """Return the suffix of a path in small letters, without its dot."""
    return Path(name).suffix[1:].lower()


def composed(name: str) -> str:
    """Return a name the same however its accents are written."""
    return unicodedata.normalize("NFC", name)


def stem(name: str) -> str:
    """Return a path without its suffix, the same however its accents are written."""
    return composed(name.rpartition(".")[0])
