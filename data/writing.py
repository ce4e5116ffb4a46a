"""Writes samples into tar shards, each atomically; what was interrupted goes on, what is done stays."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.manifest import read_manifest
from ldm.data.writer import tar_writer
from ldm.io.atomic import sweep, write_text
from ldm.io.lock import held

MANIFEST, JOURNAL = "shards.json", "packing.jsonl"

Members = Mapping[str, str | bytes]
"""A sample of a shard: "__key__" and member name ("png", "txt", ...) to content."""


@dataclass(frozen=True)
class Finished:
    """A finished shard of a set that is being packed: a line of its journal.

    Args:
        split: "train" or "val".
        size: Its size in bytes.
        samples: How many it holds.
        note: What ``Samples.note`` gave.
    """

    split: str
    size: int
    samples: int
    note: Any = None


class Samples:
    """The samples of a split in their order, which is entered again after an interruption.

    Args:
        made: Yields all of them, the same ones whenever it is packed.
    """

    def __init__(self, made: Iterable[Members]) -> None:
        self._made = made

    def after(self, finished: Sequence[Finished]) -> Iterator[Members]:
        """Yield the samples after those of the finished shards of this split."""
        return islice(self._made, sum(shard.samples for shard in finished), None)

    def note(self) -> Any:
        """Return primitives about the samples since the last call, from which ``after`` restores the rest."""
        return None


def write_shards(samples: Iterable[Members], folder: Path, name: str, shard_size: int) -> list[Path]:
    """Write ``name-000000.tar``, ``name-000001.tar``, ... of ``shard_size`` samples, the last of fewer.

    The same samples give the same bytes. A shard is written under a temporary name and renamed when complete.

    Returns:
        The shards, none if there are no samples.
    """
    return [path for path, _ in _shards(iter(samples), folder, name, shard_size)]


def _shards(
    rest: Iterator[Members], folder: Path, name: str, shard_size: int, first: int = 0
) -> Iterator[tuple[Path, int]]:
    """Write shards from number ``first`` on; yield each and its number of samples once it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    while chunk := list(islice(rest, shard_size)):
        path = folder / f"{name}-{first:06d}.tar"
        _write_shard(chunk, path)
        yield path, len(chunk)
        first += 1


def pack(
    folder: Path,
    settings: dict[str, Any],
    splits: Mapping[str, Samples],
    shard_size: int,
    total: int,
    words: Mapping[str, str] | None = None,
    finish: Callable[[], object] = lambda: None,
) -> bool:
    """Write all splits of a set into a folder, once.

    The manifest is written first, unfinished, and a line of the journal after each shard: a call that was
    interrupted goes on after its last shard, to the bytes of one that was not.

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
        ValueError: If the folder holds a set with other settings or tar files of others, a split is empty, or
            another process packs into it.
    """
    words = dict(words or {})
    if _is_packed(folder, settings, words):
        return False
    with held(folder, "--out"):
        done = _begun(folder, settings, words)
        _make_room(folder, tuple(splits), done)
        sweep(folder)
        manifest = {"settings": settings, "words": words}
        _write_manifest(folder, {**manifest, "shards": None})
        write_text(folder / JOURNAL, "".join(_line(name, shard) for name, shard in done.items()))
        for name, shard in _packed(folder, splits, shard_size, total, done):
            with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(_line(name, shard))
            done[name] = shard
        counts = {split: sum(s.samples for s in done.values() if s.split == split) for split in splits}
        finish()
        sizes = {name: shard.size for name, shard in done.items()}
        _write_manifest(folder, {**manifest, "shards": sizes, "counts": counts})
        (folder / JOURNAL).unlink()
    return True


def _packed(
    folder: Path, splits: Mapping[str, Samples], shard_size: int, total: int, done: Mapping[str, Finished]
) -> Iterator[tuple[str, Finished]]:
    """Write the shards that are not done; yield the name of each and what the journal says of it."""
    begun = sum(shard.samples for shard in done.values())
    with tqdm(total=total, initial=begun, unit=" samples", desc=f"pack {folder}") as bar:
        for split, samples in splits.items():
            finished = [shard for shard in done.values() if shard.split == split]
            rest, num = _counted(samples.after(finished), bar), len(finished)
            for path, count in _shards(rest, folder, split, shard_size, num):
                yield path.name, Finished(split, path.stat().st_size, count, samples.note())
                num += 1
            if not num:
                raise ValueError(f"{folder}: the split '{split}' has no samples, expected at least one")


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a set that was packed to its end."""
    return (_read_manifest(folder) or {}).get("shards") is not None


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
    if differences := _differences(found, settings, words):
        raise ValueError(
            f"{folder / MANIFEST}: the folder was packed with {differences}; choose another "
            "--out, repeat the old settings, or delete the folder"
        )
    paths = {folder / name: size for name, size in found["shards"].items()}
    return all(path.exists() and path.stat().st_size == size for path, size in paths.items())


def _begun(folder: Path, settings: dict[str, Any], words: dict[str, str]) -> dict[str, Finished]:
    """Return the shards that an interrupted call finished, by name, up to the first that is not there."""
    found = _read_manifest(folder)
    if found is None or found["shards"] is not None:
        return {}
    if differences := _differences(found, settings, words):
        print(f"{folder}: was begun with {differences}: packing anew", file=sys.stderr)
        return {}
    done: dict[str, Finished] = {}
    with suppress(OSError, ValueError, TypeError):  # the last line may be torn
        for line in (folder / JOURNAL).read_text(encoding="utf-8").splitlines():
            name, about = json.loads(line)
            shard = Finished(**about)
            if (folder / name).stat().st_size != shard.size:
                break
            done[name] = shard
    if done:
        print(f"{folder}: going on after {len(done)} finished shards", file=sys.stderr)
    return done


def _line(name: str, shard: Finished) -> str:
    return json.dumps([name, asdict(shard)]) + "\n"


def _differences(found: dict[str, Any], settings: dict[str, Any], words: dict[str, str]) -> str:
    """Say in which settings a manifest differs; empty if in none."""
    now, before = json.loads(json.dumps(settings)), found["settings"]
    return ", ".join(
        _difference(name, before.get(name), value, found.get("words", {}).get(name), words.get(name))
        for name, value in now.items()
        if before.get(name) != value
    )


def _difference(name: str, before: Any, now: Any, words_before: str | None, words_now: str | None) -> str:
    if words_now is None:
        return f"{name}={before!r} instead of {now!r}"
    if words_before == words_now:
        return f"{words_now}, which have changed since"
    return f"{words_before or f'another {name}'} instead of {words_now}"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    return read_manifest(folder / MANIFEST, ("settings", "shards"), "choose another --out or delete it")


def _make_room(folder: Path, splits: tuple[str, ...], done: Collection[str]) -> None:
    """Delete the shards of an earlier, interrupted call that are not done; refuse tar files of others.

    A pattern such as train-*.tar would silently read what they left behind.
    """
    ours = re.compile(rf"({'|'.join(map(re.escape, splits))})-\d{{6}}\.tar")
    is_ours = _read_manifest(folder) is not None
    for path in sorted(folder.glob("*.tar")):
        if not (is_ours and ours.fullmatch(path.name)):
            raise ValueError(f"{path}: not a shard of this set; choose another --out or delete the file")
        if path.name not in done:
            path.unlink()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
