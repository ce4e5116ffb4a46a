"""Writes samples into tar shards, each atomically; a finished folder is left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.manifest import read_manifest
from ldm.data.writer import tar_writer
from ldm.io.atomic import sweep, write_text

MANIFEST = "shards.json"

Members = Mapping[str, str | bytes]
"""A sample of a shard: "__key__" and member name ("png", "txt", ...) to content."""


def write_shards(samples: Iterable[Members], folder: Path, name: str, shard_size: int) -> list[Path]:
    """Write ``name-000000.tar``, ``name-000001.tar``, ... of ``shard_size`` samples, the last of fewer.

    The same samples give the same bytes. A shard is written under a temporary name and renamed when complete.

    Returns:
        The shards, none if there are no samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    shards: list[Path] = []
    while chunk := list(islice(rest, shard_size)):
        shards.append(folder / f"{name}-{len(shards):06d}.tar")
        _write_shard(chunk, shards[-1])
    return shards


def pack(
    folder: Path,
    settings: dict[str, Any],
    splits: Mapping[str, Iterable[Members]],
    shard_size: int,
    total: int,
    words: Mapping[str, str] | None = None,
    finish: Callable[[], object] = lambda: None,
) -> bool:
    """Write all splits of a set into a folder, once.

    The manifest is written first, unfinished, so that an interrupted call can be repeated.

    Args:
        folder: Folder for the shards.
        settings: Primitives that decide the bytes of the shards.
        splits: Name ("train", "val") to its samples.
        shard_size: Samples per shard.
        total: Number of samples, for the progress bar.
        words: What an error says of settings whose values say nothing to a person.
        finish: Writes what belongs to the set beside the shards, before it counts as complete.

    Returns:
        False if the folder already held this set.

    Raises:
        ValueError: If the folder holds a set with other settings or tar files of others, or a split is empty.
    """
    words = dict(words or {})
    if _is_packed(folder, settings, words):
        return False
    _make_room(folder, tuple(splits))
    sweep(folder)
    manifest = {"settings": settings, "words": words}
    _write_manifest(folder, {**manifest, "shards": None})
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    with tqdm(total=total, unit=" samples", desc=f"pack {folder}") as bar:
        for name, samples in splits.items():
            shards = write_shards(_counted(samples, bar), folder, name, shard_size)
            counts[name] = bar.n - sum(counts.values())
            if not shards:
                raise ValueError(f"{folder}: the split '{name}' has no samples, expected at least one")
            sizes |= {shard.name: shard.stat().st_size for shard in shards}
    finish()
    _write_manifest(folder, {**manifest, "shards": sizes, "counts": counts})
    return True


def contents(folder: Path) -> str:
    """Return in one line what a packed folder holds; sets of earlier versions do not know their counts."""
    found = _read_manifest(folder) or {}
    return described(found.get("counts", {}), [*(found.get("shards") or {}).values()])


def described(counts: Mapping[str, int], sizes: Sequence[int]) -> str:
    """Put into words: images by split, if they are known, and the bytes of each shard."""
    images = " and ".join(f"{count} {name}" for name, count in counts.items())
    return f"{images + ' images in ' if counts else ''}{len(sizes)} shards, {sum(sizes) / 1e6:.1f} MB"


def _counted(samples: Iterable[Members], bar: Any) -> Iterator[Members]:
    for sample in samples:
        yield sample
        bar.update()


def _write_shard(samples: Iterable[Members], path: Path) -> None:
    with tar_writer(path) as writer:
        for sample in samples:
            writer.write({name: _content(name, value) for name, value in sample.items()})


def _content(name: str, value: str | bytes) -> str | bytes:
    return value.encode() if isinstance(value, str) and name != "__key__" else value


def _is_packed(folder: Path, settings: dict[str, Any], words: dict[str, str]) -> bool:
    """Whether the folder holds the complete set; refuse one with other settings."""
    found = _read_manifest(folder)
    if found is None or found["shards"] is None:
        return False
    now, before = json.loads(json.dumps(settings)), found["settings"]
    differences = [
        _difference(name, before.get(name), value, found.get("words", {}).get(name), words.get(name))
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder / MANIFEST}: the folder was packed with {', '.join(differences)}; choose another "
            "--out, repeat the old settings, or delete the folder"
        )
    paths = {folder / name: size for name, size in found["shards"].items()}
    return all(path.exists() and path.stat().st_size == size for path, size in paths.items())


def _difference(name: str, before: Any, now: Any, words_before: str | None, words_now: str | None) -> str:
    if words_now is None:
        return f"{name}={before!r} instead of {now!r}"
    if words_before == words_now:
        return f"{words_now}, which have changed since"
    return f"{words_before or f'another {name}'} instead of {words_now}"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    return read_manifest(folder / MANIFEST, ("settings", "shards"), "choose another --out or delete it")


def _make_room(folder: Path, splits: tuple[str, ...]) -> None:
    """Delete the shards of an earlier, interrupted call; refuse tar files of others.

    A pattern such as train-*.tar would silently read what they left behind.
    """
    ours = re.compile(rf"({'|'.join(map(re.escape, splits))})-\d{{6}}\.tar")
    is_ours = _read_manifest(folder) is not None
    for path in sorted(folder.glob("*.tar")):
        if not (is_ours and ours.fullmatch(path.name)):
            raise ValueError(f"{path}: not a shard of this set; choose another --out or delete the file")
        path.unlink()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
