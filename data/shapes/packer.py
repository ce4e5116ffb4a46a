"""Pack captioned shapes into tar shards: ``python -m data.shapes --out shards/shapes``.

Every shard is a pure function of the settings, byte for byte, however many processes write it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data.report import closing
from data.shapes.conditions import layout, members
from data.shapes.scene import (
    SPLITS,
    Description,
    Outline,
    Scene,
    Thing,
    box,
    canonical_caption,
    render,
    sample_scene,
    sample_scenes,
    sample_wording,
    training_captions,
)
from data.writing import described
from ldm.cli import run_command
from ldm.data.writer import tar_writer
from ldm.io.atomic import sweep, write_text

MANIFEST = "shards.json"
_VERSION = 1  # raise it whenever the same settings begin to give other bytes

HELP = """\
Make captioned images of shapes and pack them into tar shards of 1,000 samples.

Each sample has three members: KEY.png (the image), KEY.txt (one caption) and KEY.json (all captions
that training may use, and the scene with the boxes of its objects, left top right bottom in pixels).

  train-*.tar  neither novel scenes nor held-out pairs; captions in all wordings
  val-*.tar    the same distribution as train, other images; canonical captions from here on
  novel-*.tar  scenes (a tenth of all) that train never holds; every caption once
  pairs-*.tar  scenes with a colour and shape that train never shows together; every caption once

With --conditions each sample also has KEY.mask.png (255 = to be painted, 10 to 50 %), KEY.low.png (4 times
smaller), KEY.map.png (0 background, 1 + i the i-th colour) and, in KEY.json, a layout (class 6 i + j: i-th
colour, j-th shape). Images and captions are the same with and without.

If the folder already holds the same set, nothing is done."""


@dataclass(frozen=True)
class Settings:
    """Settings that determine the bytes of all shards.

    Args:
        train: Number of training samples.
        val: Number of validation samples.
        novel: Number of samples of novel scenes.
        pairs: Number of samples with held-out pairs.
        size: Side of the images in pixels, at least 16.
        seed: Seed of the set.
        shard_size: Samples per shard.
        version: Version of the packer.
        conditions: Whether samples get a mask, a low-resolution image, a map of classes and a layout.
    """

    train: int = 20_000
    val: int = 1_000
    novel: int = 1_000
    pairs: int = 1_000
    size: int = 32
    seed: int = 0
    shard_size: int = 1_000
    version: int = _VERSION
    conditions: bool = False

    def __post_init__(self) -> None:
        lowest = {"size": 16, "shard_size": 1}
        for name, value in asdict(self).items():
            if value < lowest.get(name, 0):
                raise ValueError(f"--{name}: {value}, expected at least {lowest.get(name, 0)}")


@dataclass(frozen=True)
class Shard:
    """One file to write: samples ``start`` to ``stop`` of a split.

    Args:
        path: File to write.
        split: One of ``SPLITS``.
        start: Number of the first sample.
        stop: Number after the last sample.
        scenes: The scenes, if drawing them needs the full split; None draws them by number.
    """

    path: Path
    split: str
    start: int
    stop: int
    scenes: tuple[Scene, ...] | None = None


def pack(out: Path, settings: Settings, workers: int = 1) -> bool:
    """Write all shards into ``out``; False if they were already there.

    Raises:
        ValueError: If ``out`` holds a set with other settings, or foreign tar files.
    """
    if _is_packed(out, settings):
        return False
    shards = plan(out, settings)
    _refuse_foreign(out, shards)
    sweep(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(shard, settings) for shard in shards]
    total = sum(shard.stop - shard.start for shard in shards)
    with tqdm(total=total, unit=" images", desc=f"pack {out}") as bar:
        if workers > 1:
            with multiprocessing.Pool(min(workers, len(jobs) or 1)) as pool:
                for count in pool.imap_unordered(_write, jobs):
                    bar.update(count)
        else:
            for job in jobs:
                bar.update(_write(job))
    write_text(out / MANIFEST, json.dumps(_record(settings, {}), indent=2) + "\n")
    return True


def plan(out: Path, settings: Settings) -> list[Shard]:
    """List the shards of a set, train first."""
    return [shard for split in SPLITS for shard in _plan_split(out, settings, split)]


def _plan_split(out: Path, settings: Settings, split: str) -> list[Shard]:
    count = getattr(settings, split)
    drawn = sample_scenes(settings.seed, split, count) if split in ("novel", "pairs") else None
    shards = []
    for number, start in enumerate(range(0, count, settings.shard_size)):
        stop = min(count, start + settings.shard_size)
        scenes = None if drawn is None else tuple(drawn[start:stop])
        shards.append(Shard(out / f"{split}-{number:06d}.tar", split, start, stop, scenes))
    return shards


def _is_packed(out: Path, settings: Settings) -> bool:
    manifest = out / MANIFEST
    if not manifest.exists():
        return False
    try:
        found = json.loads(manifest.read_text())
        differences = [
            f"{name}={found.get(name)} instead of {value}"
            for name, value in _record(settings, found).items()
            if found.get(name) != value
        ]
    except (ValueError, AttributeError):
        differences = ["an unreadable manifest"]
    if differences:
        raise ValueError(
            f"{manifest}: the folder was packed with {', '.join(differences)}; "
            "choose another --out, repeat the old settings, or delete the folder"
        )
    missing = [shard.name for shard in _names(out, settings) if not shard.exists()]
    return not missing


def _record(settings: Settings, found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for the manifest, without conditions that the set lacks."""
    record = asdict(settings)
    if not settings.conditions and "conditions" not in found:
        del record["conditions"]
    return record


def _names(out: Path, settings: Settings) -> list[Path]:
    counts = {split: -(-getattr(settings, split) // settings.shard_size) for split in SPLITS}
    return [out / f"{split}-{number:06d}.tar" for split in SPLITS for number in range(counts[split])]


def _refuse_foreign(out: Path, shards: Sequence[Shard]) -> None:
    # A pattern such as train-*.tar would silently read what an earlier, interrupted set left behind.
    foreign = sorted(set(out.glob("*.tar")) - {shard.path for shard in shards})
    if foreign:
        raise ValueError(f"{foreign[0]}: not a shard of this set; choose another --out or delete the file")


def _write(job: tuple[Shard, Settings]) -> int:
    shard, settings = job
    with tar_writer(shard.path) as writer:
        for number in range(shard.start, shard.stop):
            writer.write(_sample(shard, number, settings))
    return shard.stop - shard.start


def _sample(shard: Shard, number: int, settings: Settings) -> dict[str, str | bytes]:
    scene = (
        sample_scene(settings.seed, number, shard.split)
        if shard.scenes is None
        else shard.scenes[number - shard.start]
    )
    is_train = shard.split == "train"
    text = sample_wording(scene, settings.seed, number) if is_train else canonical_caption(scene)
    key, image, png = f"shapes-{shard.split}-{number:010d}", render(scene, settings.size), io.BytesIO()
    Image.fromarray(image).save(png, "png")
    fields: dict[str, Any] = {"captions": training_captions(scene), "scene": to_json(scene, settings.size)}
    extra: dict[str, bytes] = {}
    if settings.conditions:
        extra, fields["layout"] = members(scene, image, f"{settings.seed}/{key}"), layout(scene)
    return {
        "__key__": key,
        "png": png.getvalue(),
        "txt": text.encode(),
        "json": json.dumps(fields).encode(),
        **extra,
    }


def to_json(scene: Scene, size: int) -> dict[str, Any]:
    """Return the scene as primitives, with the boxes of its objects in pixels of a canvas of ``size``."""
    description = scene.description
    objects = [
        {**asdict(thing), **asdict(outline), "box": box(thing.shape, outline, size)}
        for thing, outline in zip(description.things, scene.outlines, strict=True)
    ]
    return {
        "background": description.background,
        "background_rgb": scene.background_rgb,
        "where": description.where,
        "objects": objects,
    }


def from_json(fields: dict[str, Any]) -> Scene:
    """Rebuild the scene from ``to_json``: it renders to the same image at any size."""
    objects = fields["objects"]
    things = tuple(Thing(item["size"], item["colour"], item["shape"]) for item in objects)
    outlines = tuple(Outline(item["x"], item["y"], item["radius"], tuple(item["rgb"])) for item in objects)
    description = Description(things, fields["where"], fields["background"])
    return Scene(description, tuple(fields["background_rgb"]), outlines)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m data.shapes", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; made if missing")
    meanings = {
        "train": "training samples",
        "val": "validation samples",
        "novel": "samples of novel scenes (about 4,000 distinct ones exist)",
        "pairs": "samples with held-out pairs",
        "size": "side of the images in pixels, at least 16",
        "seed": "seed of the set",
        "shard_size": "samples per shard",
    }
    for name, meaning in meanings.items():
        value = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=value, metavar="N", help=f"{meaning} (default {value})")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}: all cores)"
    )
    parser.add_argument(
        "--conditions", action="store_true", help="also masks, low resolution, maps of classes and layouts"
    )
    return parser


def _run(arguments: Sequence[str] | None) -> None:
    options = vars(_parser().parse_args(arguments))
    out, workers = options.pop("out"), options.pop("workers")
    settings = Settings(**options)
    packed = pack(out, settings, workers)
    counts = {split: getattr(settings, split) for split in SPLITS}
    what = described(counts, [path.stat().st_size for path in _names(out, settings)])
    print(closing(out, packed, what, "demo/autoencoder", Path("shards/shapes")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
