"""The same bytes give the same pixels, in a shard or in a folder."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from profiles import DISPLAY_P3, profile
from tiny_shards import write_tar

from data import folder
from ldm.data.buckets import Size
from ldm.data.module import Shards
from ldm.data.raster import DECODER, upright_size
from ldm.evaluation.files import open_images
from ldm.evaluation.reference import open_shards, real_images
from ldm.sampling.requests import read_files

SIDE = 16


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)


def alpha() -> tuple[Image.Image, dict]:
    return Image.fromarray(noise(4)), {"format": "PNG"}


def turned() -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(noise(3)), {"format": "JPEG", "exif": exif}


def deep_grey() -> tuple[Image.Image, dict]:
    return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), np.uint16)), {
        "format": "PNG"
    }


def palette() -> tuple[Image.Image, dict]:
    image = Image.fromarray(noise(1)[:, :, 0] % 4, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image, {"format": "PNG", "transparency": 2}


def cmyk() -> tuple[Image.Image, dict]:
    return Image.fromarray(noise(4), "CMYK"), {"format": "JPEG"}


def display_p3() -> tuple[Image.Image, dict]:
    return Image.fromarray(noise(4)), {"format": "PNG", "icc_profile": profile(DISPLAY_P3)}


KINDS = [alpha, turned, deep_grey, palette, cmyk, display_p3]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def file(request, tmp_path):
    image, options = request.param()
    out = io.BytesIO()
    image.save(out, **options)
    path = tmp_path / "images" / f"a.{ {'PNG': 'png', 'JPEG': 'jpg'}[options['format']] }"
    path.parent.mkdir()
    path.write_bytes(out.getvalue())
    return path


def of_shard(pattern) -> torch.Tensor:
    return Shards(str(pattern), str(pattern), image_size=SIDE, batch_size=1).evaluation[0]["image"]


def test_a_folder_gives_the_pixels_of_a_shard(file, tmp_path):
    shard = write_tar(tmp_path / "s.tar", [(file.name, file.read_bytes())])
    expected = of_shard(shard)
    assert expected.shape == (3, SIDE, SIDE)
    assert torch.equal(open_images(str(file.parent), "--images")[0]["image"], expected)
    assert torch.equal(read_files({"image": str(file)}, Size(SIDE, SIDE))["image"], expected)
    for resize in (None, SIDE):
        out = tmp_path / f"out{resize}"
        folder.pack_folder(file.parent, out, "none", val_fraction=0, resize=resize)
        assert torch.equal(of_shard(out / "train-000000.tar"), expected)


def test_a_packer_that_resizes_lays_over_white_like_the_decoder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("LA", (2 * SIDE, 2 * SIDE), (0, 128)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.full((2 * SIDE, 2 * SIDE), 40 * 257, np.uint16)).save(tmp_path / "images" / "b.png")
    folder.pack_folder(tmp_path / "images", tmp_path / "out", "none", val_fraction=0, resize=SIDE)
    shard = str(tmp_path / "out" / "train-000000.tar")
    evaluation = Shards(shard, shard, image_size=SIDE, batch_size=1).evaluation
    assert {int(image["image"].unique()) for image in (evaluation[0], evaluation[1])} == {127, 40}


def test_statistics_of_an_older_decoder_are_not_taken(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / "a.png")
    shard = str(write_tar(tmp_path / "s.tar", [("a.png", (tmp_path / "images" / "a.png").read_bytes())]))

    def identities() -> list[str | None]:
        of_folder = real_images(str(tmp_path / "images"), None, None)
        of_shards = real_images(None, open_shards(shard, SIDE), SIDE)
        return [name for real in (of_folder, of_shards) for name in (real.identity, real.fingerprint)]

    now = identities()
    for module in ("ldm.data.evaluation_set", "ldm.evaluation.reference"):
        monkeypatch.setattr(f"{module}.DECODER", DECODER - 1)
    assert all(one != other for one, other in zip(now, identities(), strict=True))


def test_the_size_of_a_turned_image_is_the_one_that_is_seen(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.new("RGB", (24, 16)).save(path, exif=exif)
        assert upright_size(path) == ((24, 16) if orientation > 4 else (16, 24))
    with pytest.raises(ValueError, match=r"--images: '.*5\.jpg' is of 16 x 24 pixels, expected 24 x 16"):
        open_images(str(tmp_path), "--images")


def test_a_folder_that_cannot_be_read_is_named_by_its_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="--images: 'nowhere' does not exist"):
        open_images("nowhere", "--images")
    with pytest.raises(ValueError, match=r"--reference: folder '.*' holds none, expected some of \.png"):
        open_images(str(tmp_path), "--reference")
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"--reference: '.*a\.png' cannot be read: its 5 bytes are no"):
        open_images(str(tmp_path), "--reference")


def test_a_bitmap_is_read_from_a_folder(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.bmp")
    assert open_images(str(tmp_path), "--images")[0]["image"][:, 0, 0].tolist() == [1, 2, 3]
