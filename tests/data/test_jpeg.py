"""JPEG past Pillow: the same pixels, the same errors, one copy up to the device."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from itertools import count, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from profiles import DISPLAY_P3, profile
from tiny_shards import write_tar
from torch import Tensor

from ldm.data import jpeg, raster
from ldm.data.fields import collate, converted
from ldm.data.module import Shards
from ldm.data.view import Augment, View

SIZES = [(1, 1), (7, 9), (16, 3), (17, 33), (64, 48)]


def scene(height: int, width: int) -> Image.Image:
    """Edges, ramps and grain, as photographs have."""
    down, across = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    colours = np.stack([down * 3, across * 4, 255 * ((down // 5 + across // 7) % 2)], -1)
    return Image.fromarray(np.clip(colours + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def by_pillow(content: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS = [{"exif": turned()}, {"icc_profile": profile(DISPLAY_P3)}, {"mode": "CMYK"}]


def moved_behind_the_frame(content: bytes) -> bytes:
    """Move the first application segment behind the header of the frame, where it is as valid."""
    starts, place = [], 2
    while content[place + 1] != 0xDA:
        starts.append(place)
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    segments = [content[a:b] for a, b in pairwise([*starts, place])]
    special = next(s for s in segments if s[1] in (0xE1, 0xE2, 0xEE))
    return b"".join([content[:2], *(s for s in segments if s is not special), special, content[place:]])


@pytest.fixture(params=jpeg.DECODERS)
def decoder(request, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setattr(jpeg, "CHOSEN", request.param)
    jpeg._decoder.cache_clear()
    jpeg._decoder_into.cache_clear()
    yield
    jpeg._decoder.cache_clear()
    jpeg._decoder_into.cache_clear()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_pixels_are_those_of_pillow(decoder, subsampling, progressive):
    for size in SIZES:
        for quality in (30, 75, 95):
            options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
            for image in (scene(*size), scene(*size).convert("L")):
                content = encoded(image, **options, restart_marker_blocks=quality % 2)
                found, expected = jpeg.pixels(content), by_pillow(content)
                assert found.shape == expected.shape and found.dtype == torch.uint8
                assert (found.float() - expected.float()).abs().mean() <= 1
    assert torch.equal(
        jpeg.pixels(encoded(scene(9, 9), keep_rgb=True)), by_pillow(encoded(scene(9, 9), keep_rgb=True))
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_damaged_files_end_as_they_do_with_pillow(decoder, options, capfd):
    content, rng = encoded(scene(24, 40), quality=80, **options), np.random.default_rng(0)
    files = [content[:length] for length in range(0, len(content), 37)]
    for _ in range(200):
        mutant = bytearray(content)
        for position in rng.integers(2, len(content), 2):
            mutant[position] = rng.integers(256)
        files.append(bytes(mutant))
    ends = Counter(both(file) for file in files)
    assert ends["image", "image"] > 50 < ends["error", "error"]
    assert ends["image", "error"] + ends["error", "image"] < 5, "a header that only Pillow finds odd"


def both(file: bytes) -> tuple[str, str]:
    """Decode with ours and with Pillow; what each ends in."""
    try:
        expected = by_pillow(file)
    except Exception:
        expected = None
    try:
        found = raster.rgb(file)
    except ValueError as error:
        assert re.search("cannot be decoded|no JPEG", str(error))
        found = None
    if found is not None and expected is not None:
        assert (found.float() - expected.float()).abs().mean() <= 1
    return tuple("error" if each is None else "image" for each in (found, expected))


@pytest.mark.parametrize("options", KINDS)
def test_what_turns_or_colours_an_image_is_left_to_pillow(options):
    content = encoded(scene(16, 24).convert(options.pop("mode", "RGB")), **options)
    assert not jpeg.plain_size(content, 1 << 20)
    assert not jpeg.plain_size(moved_behind_the_frame(content), 1 << 20)


def test_plain_files_are_known_as_such():
    for options in ({}, {"progressive": True}, {"keep_rgb": True}, {"comment": b"hello"}, {"optimize": True}):
        content = encoded(scene(16, 24), **options)
        assert jpeg.plain_size(content, 16 * 24) and not jpeg.plain_size(content, 16 * 24 - 1)
        assert not any(jpeg.plain_size(content[:length], 1 << 20) for length in range(100))
    assert not jpeg.plain_size(b"", 1) and not jpeg.plain_size(b"\xff\xd8\xff" * 9, 1)


def test_images_stay_channels_last_until_they_are_on_the_device(tmp_path):
    files = []
    for number, size in enumerate([(32, 32), (32, 48), (80, 64), (32, 32)]):
        files.append((f"{number}.jpg", encoded(scene(*size), quality=95)))
        mask = io.BytesIO()
        Image.new("L", size[::-1], 255 * (number % 2)).save(mask, "PNG")
        files.append((f"{number}.mask.png", mask.getvalue()))
    shard = str(write_tar(tmp_path / "a.tar", files))
    data = Shards(shard, shard, image_size=32, batch_size=4, fields=["image", "mask"])
    batch, again = (
        next(islice(data.source.loader(lambda: 0, 4, workers, data._rank()), 1)) for workers in (0, 1)
    )
    for name in ("image", "mask"):
        assert batch[name].is_contiguous(memory_format=torch.channels_last)
        assert again[name].is_contiguous(memory_format=torch.channels_last) and again[name].is_shared()
        assert torch.equal(again[name], batch[name])
        assert all(torch.equal(one, data.source[n][name]) for n, one in enumerate(batch[name]))
    assert converted(again)["image"].is_contiguous()
    image = batch["image"]
    assert torch.equal(converted(batch)["image"], image.contiguous().float() / 127.5 - 1.0)


def all_kinds(path: Path) -> str:
    """Write a shard of images of all kinds, some of which cannot be used."""
    whole = encoded(scene(32, 32))
    png = io.BytesIO()
    scene(32, 32).save(png, "PNG")
    images = [
        ("jpg", whole),
        ("jpg", encoded(scene(40, 64))),
        ("jpg", encoded(scene(20, 16).convert("L"))),
        ("png", png.getvalue()),
        ("jpg", encoded(scene(32, 32), exif=turned())),
        ("jpg", whole[: len(whole) // 2]),
        ("jpg", encoded(scene(48, 48).convert("CMYK"))),
        ("jpg", b"no image"),
    ]
    files = []
    for number in range(32):
        name, content = images[number * 5 % len(images)]
        text = b"" if number in (6, 17) else b"caption %d" % number
        files += [(f"{number:02d}.{name}", content), (f"{number:02d}.txt", text)]
    return str(write_tar(path, files))


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_a_batch_are_those_that_are_read_alone(decoder, tmp_path, workers):
    shard = all_kinds(tmp_path / "a.tar")
    augment = Augment(flip=0.5, crop="random")
    data = Shards(shard, shard, image_size=32, batch_size=8, fields=["image", "text"], augment=augment)
    batches = islice(data.source.loader(lambda: 0, 8, workers, data._rank()), 5)
    for start, batch in zip(count(0, 8), batches, strict=False):
        alone = [data.source[position] for position in range(start, start + 8)]
        assert batch["key"] == [sample["key"] for sample in alone]
        assert batch["text"] == [sample["text"] for sample in alone]
        assert torch.equal(batch["image"], torch.stack([sample["image"] for sample in alone]))
        assert batch["skipped"] == [each for sample in alone for each in sample.get("skipped", ())]
    for batch in data.evaluation.loader(8, workers, data._rank()):
        positions = [n for n, key in enumerate(keys_of(data)) if key in batch["key"]]
        alone = [data.evaluation[n]["image"] for n in positions]
        assert torch.equal(batch["image"], torch.stack(alone))


def keys_of(data: Shards) -> list[str]:
    return [data.evaluation[n]["key"] for n in range(len(data.evaluation))]


def test_a_batch_is_the_memory_that_its_images_were_decoded_into(tmp_path):
    shard = all_kinds(tmp_path / "a.tar")
    source = Shards(shard, shard, image_size=32, batch_size=8, fields=["image", "text"]).source
    samples = source.__getitems__(list(range(8)))
    assert collate(samples)["image"].data_ptr() == samples[0]["image"].data_ptr()
    assert collate(samples[::-1])["image"].data_ptr() != samples[-1]["image"].data_ptr()
    assert torch.equal(collate(samples[::-1])["image"], collate(samples)["image"].flip(0))


def test_an_image_of_the_right_size_is_not_copied_before_it_is_stacked():
    image = raster.rgb(encoded(scene(32, 32)))
    assert raster.shown(image, View(32, 32)).data_ptr() == image.data_ptr()
    flipped = raster.shown(image, View(32, 32, flip=True))
    assert torch.equal(collate([{"key": "a", "image": flipped}])["image"][0], image.flip(-1))


def test_an_unknown_decoder_is_named(monkeypatch):
    monkeypatch.setenv("LDM_JPEG", "pillow")
    monkeypatch.delitem(sys.modules, "ldm.data.jpeg")
    with pytest.raises(ValueError, match="LDM_JPEG: got pillow, expected one of simplejpeg, torchvision"):
        __import__("ldm.data.jpeg")
