"""Files of object stores and web servers, read through fsspec: their versions, and parts of them."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from io import FileIO
from typing import Any, NamedTuple

import fsspec

from ldm.data.patience import WAITS, Patience, retrying

CHUNK, LEAST = 1 << 24, 1 << 20
"""Bytes of a request, and after errors at least."""
MANY = 16
"""Shards of a folder from which on it is listed, instead of a request for each."""
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_NO_STORES = {
    *("async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir", "file"),
    *(
        "filecache",
        "generic",
        "git",
        "libarchive",
        "local",
        "memory",
        "reference",
        "simplecache",
        "tar",
        "zip",
    ),
}
"""Protocols of fsspec that wrap others, or that name no file of a store."""
_OPTIONS = {"hf": {"cache_type": "none"}}
"""Of ``cat_file``, by protocol: the client of Hugging Face reads 5 MB more than it is asked for otherwise."""


class Version(NamedTuple):
    """What tells two versions of a file apart.

    Args:
        size: Bytes.
        mtime_ns: When it was modified, ns since 1970; of a remote file a hash of ``tag``.
        tag: What the store gives for a remote file: "sha256:...", "md5:...", "etag:..."; "" if nothing.
    """

    size: int
    mtime_ns: int
    tag: str = ""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def identity(path: str) -> str:
    """Return what names a shard for good: a URL of a tar without its query, which a signature may be."""
    base, _, query = path.partition("?")
    return base if query and is_remote(path) and base.endswith(".tar") else path


def shard_name(path: str) -> str:
    """Return the last part of a shard's path or URL."""
    return identity(path).rpartition("/")[2]


def beside(url: str, suffix: str) -> str:
    """Return the URL of the file with a further suffix; a query stays."""
    base, mark, query = url.partition("?")
    return base + suffix + mark + query


def check_url(url: str, option: str) -> None:
    """Refuse a URL that fsspec cannot read.

    Raises:
        ValueError: If its protocol is not that of a store, or a package for it is missing.
    """
    protocol = url.partition("://")[0].lower()
    if protocol in _NO_STORES or protocol not in fsspec.available_protocols():
        raise ValueError(
            f"{option}: '{url}': got {protocol}://, expected s3, gs, hf, http, https or another store"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = EXTRAS.get(protocol)
        advice = f"{package}: pip install 'ldm[remote]'" if package else f"another package ({error})"
        raise ValueError(f"{option}: '{url}' needs {advice}") from error


def matches(pattern: str, waits: Sequence[float] = WAITS) -> list[str]:
    """List the URLs that ``*`` in a URL stands for, in order; none if the store cannot list."""
    fs = _filesystem(pattern)
    found = retrying(identity(pattern), lambda: fs.glob(pattern), waits)
    return sorted(fs.unstrip_protocol(str(path)) for path in found)


def versions(urls: Sequence[str], waits: Sequence[float] = WAITS) -> dict[str, Version]:
    """Return the versions of files that folders with many of them list; web servers list none."""
    of_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        if not url.lower().startswith("http"):
            of_folder[url.rpartition("/")[0]].append(url)
    found: dict[str, Version] = {}
    for folder, listed in of_folder.items():
        if len(listed) >= MANY:
            infos = retrying(identity(folder), partial(_listed, folder), waits)
            named = {url: infos.get(_filesystem(url)._strip_protocol(url)) for url in listed}
            found |= {url: _version(url, info) for url, info in named.items() if info is not None}
    return found


def _listed(folder: str) -> dict[str, dict[str, Any]]:
    fs = _filesystem(folder)
    fs.invalidate_cache(folder)
    return {info["name"]: info for info in fs.ls(folder, detail=True)}


def version(url: str, waits: Sequence[float] = WAITS) -> Version:
    """Ask for the version of a file.

    Raises:
        FileNotFoundError: If it is not there.
        PermissionError: If it may not be read.
        ValueError: If the server does not say its size.
        Unreachable: If nobody answers.
    """
    fs = _filesystem(url)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(url)
        return dict(fs.info(url))

    return _version(url, retrying(identity(url), ask, waits))


def _version(url: str, info: dict[str, Any]) -> Version:
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{url}: no such shard, but a folder")
    if info.get("size") is None:
        raise ValueError(f"{url}: the server does not say its size, expected Content-Length")
    tag = _tag(info)
    return Version(int(info["size"]), int.from_bytes(sha256(tag.encode()).digest()[:8]) >> 1, tag)


def _tag(info: dict[str, Any]) -> str:
    if lfs := info.get("lfs"):  # of Hugging Face
        return f"sha256:{lfs['sha256']}"
    if md5 := info.get("md5Hash"):  # of Google
        return f"md5:{b64decode(md5).hex()}"
    for key in ("ETag", "etag", "blob_id", "generation", "Last-Modified"):
        if value := info.get(key):
            return f"{key.lower()}:{str(value).strip(chr(34))}"
    return ""


def fetch(url: str, waits: Sequence[float] = WAITS) -> bytes | None:
    """Read a small file; None if the store does not give it, for which some have one answer, some several."""
    try:
        return bytes(retrying(identity(url), lambda: _filesystem(url).cat_file(url), waits))
    except (FileNotFoundError, PermissionError, ValueError):
        return None


def read(url: str, start: int, size: int, waits: Sequence[float] = WAITS) -> bytes | None:
    """Read a range of a file; None if the server gives no ranges."""

    def ask() -> bytes | None:
        found = b""
        for offset, piece in _pieces(url, start, start + size, CHUNK):
            if offset != start + len(found):
                return None
            found += piece
        return found

    return retrying(identity(url), ask, waits)


def download(url: str, file: FileIO, size: int, waits: Sequence[float] = WAITS) -> None:
    """Write a file, from where an earlier download ended.

    Where a server gives no ranges it is read from the front again.

    Args:
        url: The file.
        file: What there is of it, open for writing.
        size: Its bytes.
        waits: Seconds before each further try without a byte.

    Raises:
        Unreachable: If its end is not reached.
    """
    patience, chunk = Patience(identity(url), waits), CHUNK
    while (done := file.seek(0, os.SEEK_END)) < size:
        try:
            for offset, piece in _pieces(url, done, size, chunk):
                file.seek(offset)
                file.write(piece)
                if offset + len(piece) > done:
                    patience.renew()
        except Exception as error:  # stores and servers raise anything
            if isinstance(error, OSError) and error.errno in OF_DISK:
                raise
            patience.after(error)
            chunk = max(chunk // 4, LEAST)


OF_DISK = (28, 122, 27, 30)
"""ENOSPC, EDQUOT, EFBIG, EROFS."""


def _pieces(url: str, start: int, end: int, chunk: int) -> Iterator[tuple[int, bytes]]:
    """Yield offsets and contents of consecutive parts of a range; from 0 on if a server gives no ranges."""
    if url.lower().startswith("http"):
        yield from _streamed(url, start, end)
        return
    fs, options = _filesystem(url), _OPTIONS.get(url.partition("://")[0].lower(), {})
    for offset in range(start, end, chunk):
        piece = fs.cat_file(url, start=offset, end=min(offset + chunk, end), **options)
        if len(piece) != min(chunk, end - offset):
            raise ConnectionError(f"got {len(piece)} bytes of {min(chunk, end - offset)} at byte {offset}")
        yield offset, piece


def _streamed(url: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    if start >= end:
        return
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with _filesystem(url).open(url, "rb", block_size=0, size=end, headers=headers) as stream:
        offset = start if stream.r.status == 206 else 0
        while offset < end:
            piece = stream.read(min(LEAST, end - offset))
            if not piece:
                raise ConnectionError(f"the connection ended at byte {offset} of {end}")
            yield offset, piece
            offset += len(piece)


def _filesystem(url: str) -> Any:
    return _made(url.partition("://")[0].lower(), os.getpid())


@lru_cache
def _made(protocol: str, process: int) -> Any:
    """Make a file system, which all threads of this process share, but none that was forked."""
    more: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        client = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        more["client_kwargs"] = {**client, "timeout": ClientTimeout(sock_connect=30, sock_read=60)}
    return fsspec.filesystem(protocol, **more)
