"""The headers of a tar file, read without its bodies, and the names of shards.

Several times faster than ``tarfile``, which builds an object per member; and strict: a tar without its
end marker was cut short, and is refused.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import FileIO
from posixpath import dirname, join, normpath

import braceexpand

from ldm.data.remote import check_url, is_remote, matches
from ldm.io.atomic import MARK
from ldm.io.weights import stand_in

INDEX = ".index.npz"
"""Suffix of the name of a shard's index."""
_BLOCK = 512
_MAX_LINKS = 8
"""Links that lead to another one, as Linux follows up to forty."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


def expand(patterns: str | Sequence[str], name: str) -> list[str]:
    """Expand braces (``{000000..000019}``, ``{a,b}``) and shell globs into paths of shards, in a fixed order.

    In URLs ``*`` is the only wildcard. Whether a URL without one is there shows when it is read.

    Args:
        patterns: One pattern or several, of paths or URLs.
        name: The config key, for messages.

    Raises:
        ValueError: If there is no pattern, one is a URL that is refused, or a shard is listed twice.
        FileNotFoundError: If a pattern matches nothing, or a listed file is missing.
    """
    paths: list[str] = []
    for pattern in urls(patterns, name):
        path = os.path.expanduser(pattern.removeprefix("file://"))
        if is_remote(path):
            check_url(path, name)
        if not has_wildcard(path) or (os.path.exists(path) and not is_remote(path)):
            paths.append(path)
        elif found := _matches(path):
            paths += found
        else:
            raise FileNotFoundError(f"{name}: the pattern '{pattern}' matches no file, expected tar shards")
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        if os.path.isdir(folder := missing[0]):
            inside = os.path.join(folder, "*.tar")
            raise FileNotFoundError(
                f"{name}: '{folder}' is a folder, expected the tar shards in it: '{inside}'"
            )
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(paths)} shards are missing, the first is '{missing[0]}': a glob "
            "such as train-*.tar takes those that are there"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{name}: the shard '{twice}' is listed more than once, expected each once")
    return paths


def has_wildcard(path: str) -> bool:
    """Whether a path has shell wildcards, or a URL the only one that they know, ``*``."""
    return "*" in path if is_remote(path) else glob.has_magic(path)


def _matches(pattern: str) -> list[str]:
    """List the files that a glob matches, but for our own; the folder may have brackets in its name."""
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    found = matches(pattern) if is_remote(pattern) else sorted(glob.glob(pattern))
    return [path for path in found if not path.endswith(INDEX) and MARK not in os.path.basename(path)]


def urls(patterns: str | Sequence[str], name: str) -> list[str]:
    """Expand the braces of ``patterns``; refuse what is empty or would run a program.

    Raises:
        ValueError: If there is no pattern, the braces of one do not match, or it is a ``pipe:`` URL or chains
            URLs by ``::``.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    found = [url for pattern in listed for url in _alternatives(pattern, name) if url.strip()]
    if not found:
        raise ValueError(
            f"{name}: the list of shards is empty, expected paths such as shards/{{000..019}}.tar"
        )
    for url in found:
        if url.strip().lower().startswith("pipe:"):
            raise ValueError(
                f"{name}: '{url}' would run a program: 'pipe:' is refused, expected paths of tars"
            )
        if "::" in url and "://" in url:
            raise ValueError(f"{name}: '{url}' chains URLs: '::' is refused, expected the URL of a tar")
    return found


def _alternatives(pattern: str, name: str) -> list[str]:
    """Expand braces, but for those in the names of a file or folder that is there."""
    folder, base = os.path.split(pattern)
    if os.path.exists(os.path.expanduser(pattern)):
        return [pattern]
    try:
        if folder and os.path.isdir(os.path.expanduser(folder)):
            return [os.path.join(folder, found) for found in braceexpand.braceexpand(base)]
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ValueError(
            f"{name}: the braces of '{pattern}' do not match, and no such file is there"
        ) from error


def split_name(name: str) -> tuple[str | None, str]:
    """Split a member's name at the first dot of its last part, as webdataset does: key and extension.

    The key is None for a member outside of samples (no dot, or a hidden file).
    """
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None, ""
    return folder + slash + stem, extension.lower()


def members(
    path: str, dangling: list[str] | None = None, file: FileIO | None = None
) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the body, size in bytes) of the files in a tar, and of links to them.

    Reads ustar, GNU (long names) and PAX headers. Links, hard and symbolic ones, are followed to members of
    this tar and nowhere else; those to later members come last.

    Args:
        path: The tar.
        dangling: Takes the names of links that lead to no member.
        file: The tar, if it is open; it stays so.

    Raises:
        ValueError: If the file is not an uncompressed tar or is damaged. Bodies are not checked.
    """
    with FileIO(path) if file is None else nullcontext(file) as file:
        try:
            bodies: dict[str, tuple[int, int]] = {}
            links: dict[str, str] = {}
            for name, target, offset, size in _headers(file.fileno(), os.fstat(file.fileno()).st_size):
                found = (offset, size) if target is None else bodies.get(target)
                if found is None:
                    links[name] = str(target)
                else:
                    bodies[normpath(name)] = found
                    yield name, *found
            yield from _followed(links, bodies, [] if dangling is None else dangling)
        except ValueError as error:
            raise ValueError(f"{path}: broken tar: {error}") from error


def _followed(
    links: dict[str, str], bodies: dict[str, tuple[int, int]], dangling: list[str]
) -> Iterator[tuple[str, int, int]]:
    """Yield the members that links lead to, by way of other links too; note those that lead nowhere."""
    ways = {normpath(name): target for name, target in links.items()}
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = target if target in bodies else ways.get(target, "")
        if target in bodies:
            yield name, *bodies[target]
        else:
            dangling.append(name)


def link_target(name: str, target: str, is_symbolic: bool) -> str:
    """Return the normalized name of the member that a link in a tar leads to; it may not be there."""
    return normpath(join(dirname(name), target) if is_symbolic else target)


def _headers(fd: int, end: int) -> Iterator[tuple[str, str | None, int, int]]:
    """Yield name, target, offset and size of files and links; the target, normalized, is None for a file."""
    offset = 0
    all_members: dict[str, str] = {}
    next_member: dict[str, str] = {}
    while True:
        header = os.pread(fd, _BLOCK, offset)
        if offset == 0 and (found := stand_in(header)):
            raise ValueError(found)
        if len(header) < _BLOCK:
            raise ValueError(_ending(header, offset, end))
        if header == bytes(_BLOCK):
            return
        _check(header, offset)
        kind, size = header[156:157], _number(header[124:136])
        if kind not in b"xgLK" and "size" in next_member:
            size = int(next_member["size"])
        elif kind in b"123456":
            size = 0  # links, devices and folders have no body
        body = offset + _BLOCK
        if body + size > end:
            what = f"member '{_name(header)}' at byte {offset} needs {size} bytes"
            raise ValueError(f"{what}, but only {end - body} are left: it is cut short")
        offset = body + -(-size // _BLOCK) * _BLOCK
        if kind == b"g":
            all_members = _records(os.pread(fd, size, body))
        elif kind == b"x":
            next_member = {**next_member, **_records(os.pread(fd, size, body))}
        elif kind == b"L":
            next_member["path"] = _text(os.pread(fd, size, body).rstrip(b"\0"))
        elif kind == b"K":
            next_member["linkpath"] = _text(os.pread(fd, size, body).rstrip(b"\0"))
        else:
            known = {**all_members, **next_member}
            name = known.get("path") or _name(header)
            if kind in b"0\0007":
                yield name, None, body, size
            elif kind in b"12":
                target = known.get("linkpath") or _text(header[157:257].split(b"\0", 1)[0])
                yield name, link_target(name, target, kind == b"2"), body, 0
            next_member = {}


def _ending(header: bytes, offset: int, end: int) -> str:
    if offset == 0 and header[:2] in _COMPRESSED:
        return _is_compressed(header)
    if end == 0:
        return "the file is empty, expected a tar"
    if offset == 0:
        return f"the file has {end} bytes, too few for a tar"
    return f"it ends at byte {end} without the end-of-archive block: it is cut short or still being written"


def _is_compressed(header: bytes) -> str:
    return f"it is compressed ({_COMPRESSED[header[:2]]}), expected a plain tar: decompress it first"


def _check(header: bytes, offset: int) -> None:
    """Compare the header's checksum, whose own field counts as blanks."""
    try:
        stored = _number(header[148:156])
    except ValueError:
        stored = -1
    if stored == sum(header) - sum(header[148:156]) + 8 * 32:
        return
    if offset == 0 and header[:2] in _COMPRESSED:
        raise ValueError(_is_compressed(header))
    reason = "the file is damaged there" if offset else "the file is not a tar"
    raise ValueError(f"no valid header at byte {offset}: {reason}")


def _number(field: bytes) -> int:
    """Read an octal number, or GNU's base 256 for large ones."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _records(body: bytes) -> dict[str, str]:
    """Parse the records ("LENGTH KEY=VALUE" and a line feed) of a PAX header."""
    found = {}
    while body.strip(b"\0"):
        try:
            length = int(body.split(b" ", 1)[0])
            record, body = body[:length], body[length:]
            key, value = record.split(b" ", 1)[1][:-1].split(b"=", 1)
        except (ValueError, IndexError) as error:
            raise ValueError("an extended (PAX) header is damaged") from error
        found[_text(key)] = _text(value)
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
