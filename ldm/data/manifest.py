"""JSON files of a folder of shards: the packer's settings, and latents.json of ``ldm.encode``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.data.buckets import Size
from ldm.data.cache import DEFAULT
from ldm.data.remote import check_url, identity, is_remote
from ldm.data.tar import expand, has_wildcard, urls
from ldm.io.atomic import write_text

LATENTS = "latents.json"


def read_manifest(path: Path, keys: Sequence[str], remedy: str) -> dict[str, Any] | None:
    """Read a manifest; None if there is none.

    Args:
        path: The file.
        keys: What it must have.
        remedy: What to do about another file, for the message.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.exists():
        return None
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        lacking = [key for key in keys if key not in manifest]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is no manifest ({error!r}): {remedy}") from error
    if lacking:
        raise ValueError(f"{path}: is no manifest (it has no {' and no '.join(lacking)}): {remedy}")
    return manifest


def read_latents(folder: Path) -> dict[str, Any] | None:
    """Read latents.json in a folder: "autoencoder", "image_size" and "shards"; None if there is none."""
    keys = ("autoencoder", "image_size", "shards")
    return read_manifest(folder / LATENTS, keys, "encode the shards again with ldm.encode")


def stored_fields(shards: str | Sequence[str], option: str) -> tuple[str, ...]:
    """Name the fields that ``ldm.encode`` stored in the folders of shards, in all of them.

    Args:
        shards: Pattern or paths.
        option: What names them, for messages.
    """
    found = [read_latents(folder) for folder in folders(shards, option)]
    if not found or None in found:
        return ()
    has_text = all(manifest is not None and "text" in manifest for manifest in found)
    return ("latent", "text_embedding") if has_text else ("latent",)


def latents_buckets(shards: str | Sequence[str], option: str) -> tuple[Size, ...]:
    """Return the sizes of the images that shards hold latents of; none if all are square.

    Args:
        shards: Pattern or paths.
        option: What names them, for messages.

    Raises:
        ValueError: If folders differ.
    """
    manifests = [read_latents(folder) or {} for folder in folders(shards, option)]
    found = {tuple(Size(*size) for size in manifest.get("buckets") or ()) for manifest in manifests}
    if len(found) > 1:
        raise ValueError(
            f"{option}: folders hold latents of other sizes each, expected the same ldm.encode --buckets"
        )
    return next(iter(found), ())


def folders(shards: str | Sequence[str], option: str) -> list[Path]:
    """List the folders that shards lie in; for URLs, folders of the cache with a copy of their latents.json.

    Args:
        shards: Pattern or paths.
        option: What names them, for messages.
    """
    paths = [os.path.expanduser(url) for url in urls(shards, option)]
    if any(has_wildcard(os.path.dirname(path)) for path in paths):
        paths = expand(shards, option)
    remote = {identity(path).rpartition("/")[0] for path in paths if is_remote(path)}
    local = {Path(path).parent for path in paths if not is_remote(path)}
    return sorted(local | {_copied(folder, option) for folder in remote})


def _copied(url: str, option: str) -> Path:
    """Copy latents.json of a remote folder, if there is one, to a folder of the cache."""
    folder = Path(DEFAULT.index_dir, re.sub(r"\.{2,}|:/+", "/", url).replace("//", "/"))
    with suppress(ValueError):  # a protocol that only webdataset reads
        check_url(url, option)
        content = DEFAULT.fetch(f"{url}/{LATENTS}")
        if content is not None:
            write_text(folder / LATENTS, content.decode(errors="replace"))
        else:
            (folder / LATENTS).unlink(missing_ok=True)
    return folder


def latents_size(shards: str | Sequence[str], option: str) -> int | None:
    """Return the side of the images that shards hold latents of; None unless all folders have latents.json.

    Args:
        shards: Pattern or paths.
        option: What names them, for messages.

    Raises:
        ValueError: If folders differ.
    """
    found = [read_latents(folder) for folder in folders(shards, option)]
    sizes = {None if manifest is None else int(manifest["image_size"]) for manifest in found}
    if len(sizes - {None}) > 1:
        raise ValueError(f"{option}: latents of images of sizes {sorted(map(str, sizes))}, expected one size")
    return None if None in sizes else next(iter(sizes), None)
