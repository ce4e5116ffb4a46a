"""What says of shards of latents which autoencoder made them: latents.json beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.data.module import Shards
from ldm.data.tar import expand
from ldm.stages.stage import Stage

MANIFEST = "latents.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read what ``ldm.encode`` wrote beside its shards; None if there is nothing.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["autoencoder"]["sha256"], manifest["image_size"], manifest["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no manifest of ldm.encode ({error!r}): encode the shards again"
        ) from error
    return dict(manifest)


def check_source(data: Shards, stage: Stage) -> None:
    """Check that latents in the data come from the autoencoder that the stage decodes with.

    Raises:
        ValueError: If they come from another, or if nothing says where they come from.
    """
    if "latent" in data.fields:
        for folder in folders(data.train_shards, "data.train"):
            manifest = read_manifest(folder)
            if manifest is None:
                raise ValueError(f"data.train: no {MANIFEST} in '{folder}', expected what ldm.encode wrote")
            _check(manifest, folder, "data.train", data.image_size, stage)
    for folder in folders(data.val_shards, "data.val"):  # validation uses latents wherever there are some
        if stage.upstream() and (manifest := read_manifest(folder)) is not None:
            _check(manifest, folder, "data.val", data.image_size, stage)


def folders(shards: str | list[str], name: str) -> list[Path]:
    """List the folders that shards lie in.

    Args:
        shards: Pattern or paths.
        name: Key of the configuration that gives them.
    """
    return sorted({Path(path).parent for path in expand(shards, name)})


def _check(manifest: dict[str, Any], folder: Path, name: str, image_size: int, stage: Stage) -> None:
    found = manifest["autoencoder"]["sha256"]
    if found not in stage.upstream().values():
        expected = ", ".join(f"{path} ({sha[:12]}...)" for path, sha in sorted(stage.upstream().items()))
        raise ValueError(
            f"{name}: the latents in '{folder}' were encoded by another autoencoder "
            f"({manifest['autoencoder']['checkpoint']}, SHA-256 {found[:12]}...), expected that of "
            f"model.latents: {expected or 'none'}; encode them again with python -m ldm.encode"
        )
    if manifest["image_size"] != image_size:
        raise ValueError(
            f"data.image_size: got {image_size}, but the latents in '{folder}' were encoded from "
            f"pictures of size {manifest['image_size']}"
        )
