"""Manifest (latents.json) of encoded shards: which autoencoder produced them, from images of which size."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm.data.manifest import LATENTS as MANIFEST
from ldm.data.manifest import folders, read_latents
from ldm.io.atomic import write_text

_NOTE = ".done.json"


def open_manifest(out: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Read the manifest of earlier calls of ``ldm.encode``, or begin one.

    Args:
        out: Folder for the shards.
        made_by: What the manifest must say of the autoencoder.

    Raises:
        ValueError: If ``out`` holds shards made otherwise.
    """
    manifest = read_latents(out) or {**made_by, "shards": {}}
    then, now = manifest["autoencoder"]["sha256"], made_by["autoencoder"]["sha256"]
    if then != now and _encoder(manifest) != _encoder(made_by):
        raise ValueError(
            f"--out: '{out}' holds latents of another autoencoder (SHA-256 {then[:12]}..., expected "
            f"{now[:12]}...): choose another folder, or delete this one"
        )
    for name in ("image_size", "image", "keep_images", "flip", "filter", "buckets"):
        earlier, later = manifest.get(name), made_by.get(name)
        if (earlier or None) != (later or None):
            raise ValueError(
                f"--out: '{out}' was encoded with {name} {earlier}, expected {later}: choose another "
                "folder, or delete this one"
            )
    if (then := _text(manifest)) != (now := _text(made_by)):
        raise ValueError(
            f"--out: '{out}' holds text embeddings by {then or 'nothing'}, expected {now or 'none'}: choose "
            "another folder, or delete this one"
        )
    noted = {_noted(path) for path in _notes(out)}
    if not manifest["shards"] and (foreign := {path.name for path in out.glob("*.tar")} - noted):
        raise ValueError(f"--out: {out / min(foreign)} is there, expected a folder without other shards")
    out.mkdir(parents=True, exist_ok=True)
    return merge_notes(out, manifest)


def _text(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the text embeddings of a manifest, but not where their encoder lies."""
    return {k: v for k, v in manifest.get("text", {}).items() if k not in ("folder", "null")}


def note_shard(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Record that a shard is done, in a file of its own: no two processes write the same file."""
    write_text(out / f".{name}{_NOTE}", json.dumps(entry))


def merge_notes(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest with all notes in it, and remove them; one process alone."""
    notes = _notes(out)
    found = {_noted(path): json.loads(path.read_text(encoding="utf-8")) for path in notes}
    manifest = {**manifest, "shards": dict(sorted({**manifest["shards"], **found}.items()))}
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for path in notes:
        path.unlink()
    return manifest


def _notes(out: Path) -> list[Path]:
    return sorted(out.glob(f".*{_NOTE}"))


def _noted(note: Path) -> str:
    return note.name.removeprefix(".").removesuffix(_NOTE)


def check_source(
    fields: Collection[str],
    train: str | list[str],
    val: str | list[str],
    image_size: int,
    upstream: Mapping[str, str],
    encoder: str | None = None,
) -> None:
    """Check that latents in the data come from the autoencoder that the stage decodes with.

    Args:
        fields: What is read of the training shards.
        train: Training shards.
        val: Validation shards.
        image_size: Side of the images in pixels.
        upstream: Checkpoints that may have encoded latents, with their SHA-256; none leaves validation alone.
        encoder: ``AutoencoderLatents.encoder_sha256``: any autoencoder that shares it may have, too.

    Raises:
        ValueError: If they come from another, or if their origin is unknown.
    """
    if "latent" in fields:
        for folder in folders(train, "data.train"):
            manifest = read_latents(folder)
            if manifest is None:
                raise ValueError(f"data.train: no {MANIFEST} in '{folder}', expected what ldm.encode wrote")
            _check(manifest, folder, "data.train", image_size, upstream, encoder)
    for folder in folders(val, "data.val"):  # validation uses latents wherever there are some
        if upstream and (manifest := read_latents(folder)) is not None:
            _check(manifest, folder, "data.val", image_size, upstream, encoder)
            if manifest.get("buckets"):
                raise ValueError(
                    f"data.val: '{folder}' was encoded in buckets, but validation takes squares: name shards "
                    "of images, or encode them without --buckets"
                )


def check_text(
    fields: Collection[str],
    train: str | list[str],
    val: str | list[str],
    encoder: Mapping[str, Any] | None,
) -> None:
    """Check that text embeddings in the data come from the text encoder that the stage has.

    Args:
        fields: What is read of the training shards.
        train: Training shards.
        val: Validation shards, where embeddings are used wherever there are some.
        encoder: What decides them, by the names of the manifest's entry "text"; None if the stage reads none.

    Raises:
        ValueError: If they come from another, or if their origin is unknown.
    """
    if encoder is None:
        return
    places = {"data.train": train, "data.val": val} if "text_embedding" in fields else {"data.val": val}
    for option, shards in places.items():
        for folder in folders(shards, option):
            found = (read_latents(folder) or {}).get("text")
            if found is None and option == "data.train":
                raise ValueError(
                    f"data.train: '{folder}' has text embeddings, but no {MANIFEST} that names their "
                    "encoder: expected what ldm.encode --text wrote"
                )
            if found is not None and (other := [name for name in encoder if found[name] != encoder[name]]):
                then, now = (str(each[other[0]])[:12] for each in (found, encoder))
                raise ValueError(
                    f"{option}: '{folder}': text embeddings are of another encoder ({found['folder']}, "
                    f"{other[0]} {then}), expected {other[0]} {now}: run ldm.encode --text again, or name it "
                    "in model.conditioner"
                )


def _encoder(manifest: Mapping[str, Any]) -> str:
    """Return the hash of encoder and scale; that of the file in a manifest that does not state it."""
    autoencoder = manifest["autoencoder"]
    return str(autoencoder.get("encoder_sha256", autoencoder["sha256"]))


def _check(
    manifest: dict[str, Any],
    folder: Path,
    name: str,
    image_size: int,
    upstream: Mapping[str, str],
    encoder: str | None,
) -> None:
    found = manifest["autoencoder"]["sha256"]
    if found not in upstream.values() and _encoder(manifest) != encoder:
        expected = ", ".join(f"{path} ({sha[:8]})" for path, sha in sorted(upstream.items()))
        raise ValueError(
            f"{name}: '{folder}': latents were encoded by another autoencoder "
            f"({manifest['autoencoder']['checkpoint']}, {found[:8]}), expected {expected or 'none'}: "
            "delete the folder, or name another --out, and run ldm.encode again"
        )
    if manifest["image_size"] != image_size:
        raise ValueError(
            f"data.image_size: got {image_size}, but the latents in '{folder}' were encoded from "
            f"images of size {manifest['image_size']}"
        )
