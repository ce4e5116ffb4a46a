"""Samples of a tar read from front to back: the same ones that ``ldm.data.index`` finds by seeking."""

from __future__ import annotations

import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from posixpath import normpath
from typing import Any, Protocol
from unicodedata import normalize

from ldm.data.fields import whitelist
from ldm.data.files import warn_once
from ldm.data.keys import join_twins
from ldm.data.tar import link_target, split_name
from ldm.io.weights import FIRST, stand_in

REMEMBERED = 1 << 26
"""Bytes of members that are kept in memory, for links that may lead back to them."""


class Readable(Protocol):
    """A file or the output of a program."""

    def read(self, size: int, /) -> bytes:
        """Read at most ``size`` bytes; none at the end."""
        ...


class NotATar(ValueError):
    """Another file than a tar; another try would find it again."""


def read_samples(stream: Readable, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the whitelisted members of each sample, whose members must be neighbours.

    Links are followed to members not too far before them; others are named in a warning.

    Raises:
        NotATar: If the first bytes are of a Git LFS pointer or a web page.
        ValueError: If a sample has a member twice.
        tarfile.ReadError: If it is no intact tar.
    """
    first = stream.read(FIRST)
    if found := stand_in(first):
        raise NotATar(found)
    names = whitelist()
    rows: dict[str, dict[str, bytes]] = {}
    normal = ""
    for name, body in _members(_Rest(first, stream), url):
        key, extension = split_name(name)
        if key is None or extension not in names:
            continue
        if normalize("NFC", key) != normal:
            yield from _joined(rows)
            rows, normal = {}, normalize("NFC", key)
        row = rows.setdefault(key, {})
        if extension in row:
            raise ValueError(f"member '{name}' is there twice, expected unique names")
        row[extension] = body
    yield from _joined(rows)


def _joined(rows: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    join_twins(rows)
    yield from rows.items()


def _members(stream: Readable, url: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and bodies of files, and of links to them."""
    names, lost = whitelist(), []
    recent: OrderedDict[str, bytes] = OrderedDict()
    num_bytes = 0
    file: Any = stream
    with tarfile.open(fileobj=file, mode="r|*", encoding="utf-8", errors="backslashreplace") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if split_name(member.name)[1] not in names:
                continue
            if member.isreg():
                body = tar.extractfile(member).read()  # type: ignore[union-attr]
            elif member.islnk() or member.issym():
                found = recent.get(link_target(member.name, member.linkname, member.issym()))
                if found is None:
                    lost.append(member.name)
                    continue
                body = found
            else:
                continue
            yield member.name, body
            recent[normpath(member.name)] = body
            num_bytes += len(body)
            while num_bytes > REMEMBERED:
                num_bytes -= len(recent.popitem(last=False)[1])
    if lost:
        warn_once(
            f"{url}: {len(lost)} members are ignored, e.g. '{lost[0]}' (a link to no member shortly before "
            "it: tar --hard-dereference --dereference, or data.reader Indexed)"
        )


class _Rest:
    """A stream that can be read again after its first bytes were inspected."""

    def __init__(self, first: bytes, stream: Readable) -> None:
        self.first, self.stream = first, stream

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        if not self.first:
            return self.stream.read(size)
        found, self.first = self.first[:size], self.first[size:]
        return found
