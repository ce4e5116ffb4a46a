"""data.folder on images of other kinds than RGB of 8 bits, and on TIFF."""

import itertools
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import folder
from data.images import RGBImage
from ldm.data.kinds import decoded, stored
from ldm.io.png import encode_png
from ldm.types import ImageKind


@pytest.mark.parametrize(("channels", "bits"), [(1, 16), (4, 8)])
def test_a_declared_kind_is_kept_where_images_are_reduced(tmp_path, channels, bits):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 2**bits, (40, 30, channels)).astype(f"uint{bits}") for _ in range(3)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encode_png(pixels[0]))
    single = [each[..., 0] if channels == 1 else each for each in pixels]
    Image.fromarray(single[1]).save(tmp_path / "in" / "1.tif", compression="tiff_lzw")
    Image.fromarray(single[2][:20, :20]).save(tmp_path / "in" / "2.tiff")
    Image.fromarray(rng.integers(0, 255, (40, 30, 3)).astype(np.uint8)).save(tmp_path / "in" / "3.png")
    asked = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--captions", "none"]
    asked += ["--channels", str(channels), "--bits", str(bits), "--val-fraction", "0", "--resize", "20"]
    assert folder.main([*asked, "--low-res", "10", "--masks", "--workers", "1"]) == 0
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert skipped.startswith("of another kind\t3.png (has ") and skipped.count("\n") == 1
    kind = ImageKind(channels, bits)
    found = {"png": [], "low.png": [], "mask.png": [], "json": []}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for member in tar:
            found[member.name.partition(".")[2]].append(tar.extractfile(member).read())
    shapes = sorted(tuple(decoded(each, kind).shape) for each in found["png"])
    assert shapes == [(channels, 20, 20), (channels, 27, 20), (channels, 27, 20)]
    exact = torch.from_numpy(pixels[2][:20, :20]).permute(2, 0, 1)
    assert any(torch.equal(decoded(each, kind), exact) for each in found["png"])
    assert {decoded(each, kind).dtype for each in found["low.png"]} == {exact.dtype}


def test_tiff_of_16_bits_becomes_the_same_png_in_all_channels():
    for content, pixels in tiffs():
        assert np.array_equal(stored(RGBImage(content).content), pixels)
    place = content.index(struct.pack(">HHIH", 338, 3, 1, 2))
    near_infrared = (
        content[: place + 8] + b"\0\0" + content[place + 10 :]
    )  # a fourth channel that is no alpha
    with pytest.raises(ValueError, match="a TIFF of 1 images of 4 channels is not read"):
        RGBImage(near_infrared)


def test_grey_tiffs_are_upright_and_white_where_they_say_so(tmp_path):
    pixels = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={274: 6})
    content = (tmp_path / "a.tif").read_bytes()
    assert np.array_equal(stored(RGBImage(content).content)[..., 0], np.rot90(pixels, -1))
    place = content.index(struct.pack("<HHIH", 262, 3, 1, 1))
    inverted = content[: place + 8] + b"\0\0" + content[place + 10 :]
    assert np.array_equal(stored(RGBImage(inverted).content)[..., 0], 65535 - np.rot90(pixels, -1))


def test_a_tiff_of_several_images_is_refused(tmp_path):
    one = Image.new("L", (8, 8))
    one.save(tmp_path / "a.tif", save_all=True, append_images=[one])
    with pytest.raises(ValueError, match="a TIFF of 2 images of 1 channels is not read"):
        RGBImage((tmp_path / "a.tif").read_bytes())


def tiffs():
    """TIFFs of 16 bits in both orders of bytes, compressed or not: Pillow writes none of colours."""
    rng = np.random.default_rng(0)
    for channels, order, compression in itertools.product((3, 4), "<>", (1, 8)):
        pixels = rng.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
        data = pixels.astype(f"{order}u2").tobytes()
        data = zlib.compress(data) if compression == 8 else data
        data += b"\0" * (len(data) % 2)
        tags = {256: (4, [7]), 257: (4, [5]), 258: (3, [16] * channels), 259: (3, [compression])}
        tags |= {262: (3, [2]), 273: (4, [8]), 277: (3, [channels]), 278: (4, [5]), 279: (4, [len(data)])}
        tags |= {284: (3, [1]), 338: (3, [2])} if channels == 4 else {284: (3, [1])}
        entries, tail, place = b"", b"", 8 + len(data) + 6 + 12 * len(tags)
        for tag, (kind, values) in tags.items():
            packed = struct.pack(f"{order}{len(values)}{'HI'[kind == 4]}", *values)
            if len(packed) > 4:
                packed, tail = struct.pack(f"{order}I", place + len(tail)), tail + packed
            entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
        table = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
        yield head + data + table + tail, pixels
