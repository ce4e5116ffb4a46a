"""Columns about the samples of a shard: read once without decoding pixels, and kept.

Filters, buckets and the search for bad samples use them. They lie beside the shard's index (``000017.tar`` ->
``000017.tar.metadata.index.npz``), by rename, and are read again when size or modification time of the shard
differ from those that they were read for.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import decode
from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.decode import BadSample, Members
from ldm.data.fields import FIELDS, IMAGES, LATENT
from ldm.data.files import ShardFiles
from ldm.data.index import Summary, find_index
from ldm.data.raster import stored_size
from ldm.data.tar import INDEX
from ldm.data.view import View
from ldm.io.arrays import parsed
from ldm.io.atomic import replacing

Kind = type[float] | type[str]
_VERSION = 1  # raise it when the values change: older sidecars are then read again
_HEADER = 1 << 16
"""Bytes of an image that are read for its size; where they do not hold it, all of them are."""
_NPY_HEADER = 256
"""Bytes of a latent that are read for its shape."""


def metadata(
    summary: Summary, index_dir: str | None, columns: Mapping[str, Kind], cache: ShardCache = DEFAULT
) -> dict[str, np.ndarray]:
    """Return columns about the N samples of a shard, in the order of the tar.

    Args:
        summary: The shard.
        index_dir: Folder of its index; None: that of the shard.
        columns: Name to kind. "width" and "height" (of the image as it is decoded: those of the json member
            if it states both, else those of the image's header), "latent_width" and "latent_height", and
            "caption_length" (characters of the canonical caption) are computed, and so are ``PROBLEMS``; any
            other name is a key of the json member.
        cache: Where remote shards are staged.

    Returns:
        Per column (N,) float64, NaN where the sample has no such number (true is 1, false 0), or (N,) str
        objects, "" where it has no such text.

    Raises:
        ValueError: If the shard changed since it was summarized.
    """
    index = find_index(summary.path, index_dir, cache, summary.known_version)
    sidecar = index.with_name(f"{index.name.removesuffix(INDEX)}.metadata{INDEX}")
    found = _load(sidecar, summary, columns)
    if lacking := [name for name in columns if name not in found]:
        values = _collect(ShardFiles([summary], index_dir, cache), lacking)
        everything = {**_load(sidecar, summary, None), **values}
        with contextlib.suppress(OSError):  # without it they are read again
            _save(sidecar, summary, everything)
        found |= values
    return {name: _typed(found[name], kind) for name, kind in columns.items()}


class _Sample:
    """What one sample's members say of it, read on demand."""

    def __init__(self, files: ShardFiles, row: int) -> None:
        self.files, self.row = files, row

    @cached_property
    def json(self) -> dict[str, Any]:
        """The json member; empty where it is missing or malformed."""
        with contextlib.suppress(BadSample):
            return Members(*self.files.members(0, self.row, ("json",))).json()
        return {}

    @cached_property
    def size(self) -> tuple[float, float] | None:
        """Height and width of the image; None where there is none that can be read."""
        height, width = _side(self.json.get("height")), _side(self.json.get("width"))
        if height and width:
            return height, width
        return None if isinstance(self.header, BadSample) else self.header

    @cached_property
    def header(self) -> tuple[int, int] | BadSample:
        """Height and width by the image's header, or why training cannot read it."""
        for limit in (_HEADER, None):
            members, sample = self.files.members(0, self.row, IMAGES, limit)
            if not members:
                return sample.bad(" or ".join(IMAGES), "missing: it gives the field 'image'", "missing image")
            name, content = next(iter(members.items()))
            try:
                return stored_size(content, is_whole=limit is None)
            except ValueError as error:
                problem = sample.bad(name, str(error), "unreadable image")
        return problem

    @property
    def caption_length(self) -> float | None:
        """Characters of the canonical caption; None where it has none that is usable."""
        caption = self.caption()
        return None if isinstance(caption, BadSample) else float(len(caption))

    def caption(self, draw: int | None = None) -> str | BadSample:
        """Caption that is drawn, None: the canonical one, or why it cannot be used."""
        members, sample = self.files.members(0, self.row, FIELDS["text"].members)
        try:
            found = decode.text(Members(members, sample, View(0, 0, draw=draw)))
        except BadSample as error:
            return error
        missing = sample.bad("txt or json", "missing: it gives the field 'text'", "missing text")
        return missing if found is None else str(found.value)

    @property
    def drawn_captions(self) -> list[str | BadSample]:
        """All captions that training draws among."""
        listed = self.json.get("captions")
        return [
            self.caption(draw) for draw in range(len(listed) if isinstance(listed, list) and listed else 1)
        ]

    @cached_property
    def latent_size(self) -> tuple[float, float] | None:
        """Height and width of the latent; None where there is none that can be read."""
        members, _ = self.files.members(0, self.row, (LATENT,), _NPY_HEADER)
        with contextlib.suppress(ValueError):
            _, height, width = _npy_shape(members.get(LATENT, b""))
            return float(height), float(width)
        return None


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used.

    Args:
        reason: In two words, see ``BadSample``.
        key: Of the sample.
        message: What is wrong with it, without its shard.
    """

    reason: str
    key: str
    message: str

    @classmethod
    def from_text(cls, text: str) -> Problem:
        """Restore what a column of ``PROBLEMS`` holds."""
        return cls(*text.split("\0", 2))


def _problem(sample: _Sample, *found: object) -> str | None:
    """Write the first error among what was found, as ``Problem.from_text`` reads it."""
    error = next((each for each in found if isinstance(each, BadSample)), None)
    if error is None:
        return None
    about = sample.files.members(0, sample.row, ())[1]
    return "\0".join((error.reason, about.key, str(error).removeprefix(f"{about.shard}: ")))


COMPUTED: dict[str, Callable[[_Sample], float | None]] = {
    "width": lambda sample: sample.size and sample.size[1],
    "height": lambda sample: sample.size and sample.size[0],
    "caption_length": lambda sample: sample.caption_length,
    "latent_width": lambda sample: sample.latent_size and sample.latent_size[1],
    "latent_height": lambda sample: sample.latent_size and sample.latent_size[0],
}
"""Columns that are no keys of the json member."""
PROBLEMS: dict[str, Callable[[_Sample], str | None]] = {
    "image problem": lambda sample: _problem(sample, sample.header),
    "caption problem": lambda sample: _problem(sample, sample.caption()),
    "drawn caption problem": lambda sample: _problem(sample, *sample.drawn_captions),
}
"""Columns of texts that say why the image by its header, the canonical caption, or one of those that training
draws among cannot be used; "" where nothing is wrong."""
_FUNCTIONS: Mapping[str, Callable[[_Sample], float | str | None]] = {**COMPUTED, **PROBLEMS}

_Values = tuple[np.ndarray, list[str] | None]
"""(N,) numbers, and texts where any sample has one: a key may give both."""


def _collect(files: ShardFiles, names: Iterable[str]) -> dict[str, _Values]:
    """Read columns from the members of all samples."""
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for row in range(files.summaries[0].count):
        sample = _Sample(files, row)
        for name, values in rows.items():
            values.append(_FUNCTIONS[name](sample) if name in _FUNCTIONS else sample.json.get(name))
    return {name: _split(values) for name, values in rows.items()}


def _split(values: list[Any]) -> _Values:
    numbers = [_number(value) for value in values]
    texts = [value if isinstance(value, str) else "" for value in values]
    array = np.array([math.nan if number is None else number for number in numbers], dtype=np.float64)
    return array, texts if any(texts) else None


def _npy_shape(content: bytes) -> tuple[int, ...]:
    """Read the shape of an array from the beginning of its file; a ValueError if it is none."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    start = file.tell()

    def shape() -> tuple[int, ...]:
        file.seek(start)
        return tuple(read(file)[0])

    return parsed(shape)


def _number(value: Any) -> float | None:
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    return None


def _side(value: Any) -> float | None:
    """Return a length in pixels; None for what is none."""
    found = None if isinstance(value, bool) else _number(value)
    return found if found and found >= 1 and found.is_integer() else None


def _typed(values: _Values, kind: Kind) -> np.ndarray:
    numbers, texts = values
    if kind is float:
        return numbers
    return np.array(texts or [""] * len(numbers), dtype=object)


def _about(summary: Summary) -> str:
    return json.dumps([_VERSION, summary.size, summary.mtime_ns, summary.count])


def _save(sidecar: Path, summary: Summary, columns: Mapping[str, _Values]) -> None:
    arrays: dict[str, np.ndarray] = {"about": np.array(_about(summary))}
    for name, (numbers, texts) in columns.items():
        arrays[f"numbers {name}"] = numbers
        if texts is not None:  # their longest would make all others as long in an array
            arrays[f"texts {name}"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    with replacing(sidecar) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(sidecar: Path, summary: Summary, columns: Iterable[str] | None) -> dict[str, _Values]:
    """Return those of ``columns`` (None: all) that are kept; none if the file is damaged or stale."""
    try:
        with np.load(sidecar, allow_pickle=False) as arrays:
            if str(parsed(arrays.__getitem__, "about")) != _about(summary):
                return {}
            kept = [name.removeprefix("numbers ") for name in arrays.files if name.startswith("numbers ")]
            wanted = kept if columns is None else [name for name in columns if name in kept]
            return {
                name: (parsed(arrays.__getitem__, f"numbers {name}"), _texts(arrays, name)) for name in wanted
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _texts(arrays: Mapping[str, np.ndarray], name: str) -> list[str] | None:
    key = f"texts {name}"
    return list(json.loads(parsed(arrays.__getitem__, key).tobytes())) if key in arrays else None
