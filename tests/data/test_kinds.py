"""Images of 1, 3 and 4 channels of 8 and 16 bits: exact values, and no loss that nobody asked for."""

import io
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo, putchunk
from torchvision.io import decode_png

from ldm.data import raster
from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import collate, converted, decode_sample
from ldm.data.kinds import OtherKind, decoded
from ldm.data.view import View
from ldm.io.images import to_levels
from ldm.io.png import png_of_16_bits
from ldm.types import RGB8, ImageKind

SAMPLE = SampleId("shards/train-000003.tar", "000042")
GREY16, RGBA8, RGBA16 = ImageKind(1, 16), ImageKind(4, 8), ImageKind(4, 16)
KINDS = [ImageKind(*each) for each in product((1, 3, 4), (8, 16))]


def noise(channels, bits, height=9, width=7):
    values = np.random.default_rng(channels).integers(0, 2**bits, (height, width, channels))
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def png(pixels, **options):
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        return png_of_16_bits(pixels, PngInfo())
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out, "PNG", **options)
    return out.getvalue()


def pixels_of(content, kind):
    return decoded(content, kind).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_file_of_the_kind_is_exact_until_it_is_on_the_device_and_back(kind):
    pixels = noise(kind.channels, kind.bits)
    sample = decode_sample({"png": png(pixels)}, SAMPLE, ["image"], View(9, 7, kind=kind))
    batch = collate([sample, sample])
    assert batch["image"].dtype == (torch.uint8 if kind.bits == 8 else torch.uint16)
    image = converted(batch)["image"]
    assert image.shape == (2, kind.channels, 9, 7) and image.dtype == torch.float32
    assert image.min() >= -1 and image.max() <= 1
    assert np.array_equal(to_levels(image[1], kind.bits).permute(1, 2, 0), pixels)


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""First row and column of each pass of an interlaced PNG, and the steps (PNG, 3rd edition, 8.2)."""


def with_rows(content, rows, interlaced):
    """The file with other filtered rows, whatever image they mean."""
    start = content.index(b"IDAT") - 4
    out = io.BytesIO()
    out.write(content[:8])
    putchunk(out, b"IHDR", content[16:28] + bytes([interlaced]))
    putchunk(out, b"IDAT", zlib.compress(rows))
    return out.getvalue() + content[start + 12 + int.from_bytes(content[start : start + 4]) :]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_are_read_as_libpng_reads_them(channels, interlaced):
    pixels = noise(channels, 16, 20, 30)
    parts = [pixels[top::down, left::right] for top, left, down, right in ADAM7] if interlaced else [pixels]
    rows = [row.astype(">u2").tobytes() for part in parts for row in part]
    filtered = b"".join(bytes([n % 5]) + row for n, row in enumerate(rows))  # all five filters in turn
    content = with_rows(png_of_16_bits(pixels, PngInfo()), filtered, interlaced)
    theirs = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0)
    expected = theirs[..., [0, 0, 0, 1]] if channels == 2 else theirs
    assert np.array_equal(pixels_of(content, ImageKind(3 if channels == 3 else 4, 16)), expected)


def test_what_loses_nothing_is_converted():
    grey, rgb = noise(1, 8), noise(3, 8)
    assert np.array_equal(pixels_of(png(grey), ImageKind(3, 16)), grey.repeat(3, 2).astype(np.uint16) * 257)
    assert np.array_equal(pixels_of(png(grey.repeat(3, 2)), ImageKind(1, 8)), grey)
    opaque = np.concatenate([rgb, np.full_like(grey, 255)], 2)
    assert np.array_equal(pixels_of(png(opaque), ImageKind(3, 8, "exact")), rgb)
    assert np.array_equal(pixels_of(png(rgb.astype(np.uint16) * 257), ImageKind(3, 8, "exact")), rgb)
    with_alpha = np.concatenate([grey, noise(3, 8)[..., :1]], 2)
    expected = np.concatenate([grey.repeat(3, 2), with_alpha[..., 1:]], 2)
    out = io.BytesIO()
    Image.fromarray(with_alpha, "LA").save(out, "PNG")
    assert np.array_equal(pixels_of(out.getvalue(), RGBA8), expected)


@pytest.mark.parametrize(
    ("pixels", "kind", "text"),
    [
        (noise(3, 8), ImageKind(1, 8), "has colours"),
        (noise(3, 8), GREY16, "has colours"),
        (noise(4, 8), ImageKind(3, 8, "exact"), "has alpha"),
        (noise(4, 16), ImageKind(1, 16), "has alpha"),
        (noise(1, 16), ImageKind(1, 8), "has 16 bits"),
        (noise(3, 16), ImageKind(3, 8, "exact"), "has 16 bits"),
        (noise(3, 8), RGBA8, "has no fourth channel"),
        (noise(1, 16), RGBA16, "has no fourth channel"),
    ],
)
def test_a_loss_makes_a_bad_sample_that_names_the_declaration(pixels, kind, text):
    content = png(pixels)
    with pytest.raises(BadSample, match=rf"000042.*'png': {text}, expected {kind} \(data.image\)") as error:
        decode_sample({"png": content}, SAMPLE, ["image"], View(9, 7, kind=kind))
    assert error.value.reason == "other kind of image" and "data.image.convert any" in str(error.value)
    asked = ImageKind(kind.channels, kind.bits, "any")
    assert decoded(content, asked).shape == (kind.channels, 9, 7)


def test_conversions_that_are_asked_for_are_those_of_pillow():
    rgb, rgba = noise(3, 8, 64, 64), noise(4, 8, 64, 64)
    luma = np.array(Image.fromarray(rgb).convert("L"))[..., None]
    assert np.array_equal(pixels_of(png(rgb), ImageKind(1, 8, "any")), luma)
    over = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.fromarray(rgba)).convert("RGB")
    exact = ImageKind(3, 16, "any")  # (3, 8) would be Pillow's own
    assert np.abs(pixels_of(png(rgba), exact) / 257 - np.array(over)).max() <= 1
    deep = noise(1, 16)
    assert np.array_equal(pixels_of(png(deep), ImageKind(1, 8, "any")), np.rint(deep / 257))
    filled = pixels_of(png(rgb), ImageKind(4, 16, "any"))
    assert np.array_equal(filled[..., :3], rgb.astype(np.uint16) * 257) and (filled[..., 3] == 65535).all()


def test_the_default_kind_is_decoded_as_ever():
    files = [png(noise(c, 8)) for c in (1, 3, 4)] + [png(noise(c, 16)) for c in (1, 3, 4)]
    for content in files:
        assert torch.equal(decoded(content, RGB8), raster.rgb(content))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [GREY16, RGBA16, RGBA8], ids=str)
def test_all_kinds_are_turned_as_the_camera_says(kind, orientation):
    pixels = noise(kind.channels, kind.bits)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    info = PngInfo()
    info.add(b"eXIf", exif.tobytes()[6:])
    deep = pixels.dtype == np.uint16
    content = png_of_16_bits(pixels, info) if deep else png(pixels, exif=exif)
    numbers = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7))
    numbers.getexif()[ExifTags.Base.Orientation] = orientation
    order = np.array(ImageOps.exif_transpose(numbers))
    assert np.array_equal(pixels_of(content, kind), pixels.reshape(63, -1)[order])
    assert raster.stored_size(content) == order.shape


def test_views_crop_flip_and_resize_16_bits_as_floats_do():
    image = torch.from_numpy(noise(4, 16, 20, 30)).permute(2, 0, 1)
    flipped = raster.shown(image, View(20, 20, flip=True, crop=(0.0, 0.0)))
    assert torch.equal(flipped, image[:, :, :20].flip(-1))
    small = raster.shown(image, View(10, 10))
    exact = torch.nn.functional.interpolate(
        image[None, :, :, 5:25].double(), (10, 10), mode="bicubic", antialias=True
    )[0].clamp(0, 65535)
    assert small.dtype == torch.uint16 and (small.double() - exact).abs().max() <= 0.51


def test_damaged_and_odd_files_are_named_and_nothing_else_comes_out():
    whole = png(noise(4, 16))
    for end in range(8, len(whole) - 40, 7):
        with pytest.raises(ValueError, match=r"cannot be decoded as an image|are no JPEG"):
            decoded(whole[:end], RGBA16)
    for place in range(0, len(whole) - 12, 3):
        flipped = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        try:
            decoded(flipped, RGBA16)
        except OtherKind:
            pass
        except ValueError as error:
            assert len(str(error)) < 250
    info = PngInfo()
    info.add(b"tRNS", b"\0\1\0\2\0\3")
    with pytest.raises(ValueError, match="16 bits with a transparent colour is not supported"):
        decoded(png_of_16_bits(noise(3, 16), info), ImageKind(3, 16))


def test_grey_and_16_bits_are_taken_as_they_are_whatever_the_profile():
    from PIL import ImageCms

    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    pixels = noise(1, 16)
    assert np.array_equal(pixels_of(png(pixels, icc_profile=other), GREY16), pixels)


@pytest.mark.parametrize(("channels", "bits"), [(2, 8), (5, 8), (3, 12)])
def test_a_kind_that_files_cannot_hold_is_refused(channels, bits):
    with pytest.raises(
        ValueError, match=f"data.image: got {channels} channels of {bits} bits, expected 1, 3 or 4"
    ):
        ImageKind(channels, bits)
