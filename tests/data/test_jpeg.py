"""JPEG past Pillow: the same pixels, the same errors, one copy up to the device."""

from __future__ import annotations

import io
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import write_tar
from torch import Tensor

from ldm.data import jpeg, raster
from ldm.data.fields import collate, converted
from ldm.data.module import Shards
from ldm.data.view import View

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


@pytest.fixture(params=jpeg.DECODERS)
def decoder(request, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setattr(jpeg, "CHOSEN", request.param)
    jpeg._decoder.cache_clear()
    yield
    jpeg._decoder.cache_clear()


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
    ends = set()
    for file in files:
        try:
            expected = by_pillow(file)
        except Exception:
            with pytest.raises(ValueError, match=r"cannot be decoded|no JPEG"):
                raster.rgb(file)
            ends.add("error")
        else:
            assert (raster.rgb(file).float() - expected.float()).abs().mean() <= 1
            ends.add("image")
    assert ends == {"error", "image"}


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


def test_an_image_of_the_right_size_is_not_copied_before_it_is_stacked():
    image = raster.rgb(encoded(scene(32, 32)))
    assert raster.shown(image, View(32, 32)).data_ptr() == image.data_ptr()
    flipped = raster.shown(image, View(32, 32, flip=True))
    assert torch.equal(collate([{"key": "a", "image": flipped}])["image"][0], image.flip(-1))


def test_an_unknown_decoder_is_named(monkeypatch):
    monkeypatch.setenv("LDM_JPEG", "pillow")
    monkeypatch.delitem(sys.modules, "ldm.data.jpeg")
    with pytest.raises(ValueError, match="LDM_JPEG: got pillow, expected one of torchvision, simplejpeg"):
        __import__("ldm.data.jpeg")
