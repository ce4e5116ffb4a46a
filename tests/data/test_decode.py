"""Bytes to samples: accepted input, conversion, and the message of each refusal."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from ldm.data import arrays, decode
from ldm.data.decode import BadSample, Members, SampleId, text
from ldm.data.fields import collate, converted, decode_sample, whitelist
from ldm.data.view import View

SAMPLE = SampleId("shards/train-000003.tar", "000042")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def image_of(content: bytes, size: int, kind: str = "png") -> torch.Tensor:
    return decode_sample({kind: content}, SAMPLE, ["image"], View(size, size))["image"]


def text_of(members: dict[str, bytes], draw: int | None) -> str:
    return decode_sample(members, SAMPLE, ["text"], View(8, 8, draw=draw))["text"]


def test_an_image_of_the_right_size_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = image_of(encoded(Image.fromarray(pixels)), 8)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), pixels.transpose(2, 0, 1))


def test_grey_palette_and_16_bit_images_become_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    expected = np.stack([grey] * 3)
    assert np.array_equal(image_of(encoded(Image.fromarray(grey)), 8), expected)
    assert np.array_equal(image_of(encoded(Image.fromarray(grey).convert("P")), 8), expected)
    assert np.array_equal(image_of(encoded(Image.fromarray(grey.astype(np.uint16) * 257)), 8), expected)


def test_alpha_is_laid_over_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4, 3], pixels[:, 4:] = 0, (10, 20, 30, 255)
    image = image_of(encoded(Image.fromarray(pixels)), 8)
    assert image[:, :, :4].unique().tolist() == [255]
    assert image[:, 0, 5].tolist() == [10, 20, 30]
    half = Image.new("LA", (8, 8), (0, 128))
    assert image_of(encoded(half), 8).unique().tolist() == [127]


def test_the_camera_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))
    image = image_of(encoded(turned, "JPEG", quality=95, exif=exif), 8, "jpg")
    assert image[:, :, 5:].min() > 200 > 50 > image[:, :, :3].max()


def test_larger_images_are_cropped_in_the_centre_and_antialiased():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # a pattern that resizing without antialiasing turns into black or white
    stripes[:, :32], stripes[:, 96:] = 0, 0  # outside of the central square
    image = image_of(encoded(Image.fromarray(stripes)), 16)
    assert image.shape == (3, 16, 16)
    assert (image.float() - 127.5).abs().max() < 30


def test_constants_survive_any_size():
    for size in [(5, 9), (9, 5), (40, 30), (8, 20)]:
        image = image_of(encoded(Image.new("RGB", size, (3, 120, 250))), 8)
        assert image.flatten(1).unique(dim=1).flatten().tolist() == [3, 120, 250]


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp"])
def test_every_image_member_is_read(kind):
    format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper())
    image = image_of(encoded(Image.new("RGB", (8, 8), (200, 100, 50)), format), 8, kind)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 6


def test_captions_are_drawn_in_training_and_canonical_in_evaluation():
    meta = json.dumps({"captions": ["a", " b ", "c"], "caption": "one"}).encode()
    members = {"txt": b" canonical \n", "json": meta}
    assert [text_of(members, draw) for draw in range(4)] == ["a", "b", "c", "a"]
    assert text_of(members, None) == "canonical"
    assert text_of({"json": meta}, None) == "a"
    single = json.dumps({"caption": "one", "status": "success"}).encode()
    assert text_of({"json": single}, 5) == text_of({"json": single}, None) == "one"
    assert text_of({"txt": b"x", "json": single}, 5) == "x"


def test_labels_come_from_cls_or_json():
    def label(members):
        return decode_sample(members, SAMPLE, ["label"], View(8, 8))["label"]

    assert label({"cls": b" 7\n"}) == 7
    assert label({"json": b'{"label": 3}'}) == 3
    assert label({"cls": b"7", "json": b'{"label": 3}'}) == 7


def latent(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def test_latents_are_float16_until_they_are_on_the_device_and_their_images_are_not_decoded():
    array = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float16)
    members = {"latent.npy": latent(array), "png": b"not an image"}
    sample = decode_sample(members, SAMPLE, ["latent"], View(32, 32))
    assert set(sample) == {"key", "latent"}
    assert np.array_equal(sample["latent"].numpy(), array) and sample["latent"].dtype == torch.float16
    there = converted(collate([sample]))["latent"]
    assert np.array_equal(there.numpy(), array[None].astype(np.float32)) and there.dtype == torch.float32
    assert whitelist(["latent"], flip=False) == ("latent.npy",)
    assert whitelist(["latent"], flip=True) == ("latent.flip.npy",)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


_HUGE = latent(np.zeros((2, 1, 1), np.float32)).replace(b"(2, 1, 1)", b"(2, 1" + b"0" * 30 + b", 1)")
_HEADER = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
_BOMB = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    for kind, body in ((b"IHDR", _HEADER), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
)
BAD = {
    "no image": ("image", {"png": b"hello"}, "member 'png': its 5 bytes are no JPEG, PNG or WebP"),
    "cut image": (
        "image",
        {"png": encoded(Image.effect_noise((32, 32), 90))[:500]},
        "'png': cannot be decoded",
    ),
    "missing image": ("image", {"txt": b"x"}, r"'jpg or jpeg or png or webp': missing.* \(found txt\)"),
    "empty caption": ("text", {"txt": b" \n"}, "member 'txt': the caption is empty"),
    "null caption": ("text", {"json": b'{"caption": null}'}, "member 'json': the caption is None"),
    "odd captions": ("text", {"json": b'{"captions": "x"}'}, "'captions' is 'x', expected a list of strings"),
    "latin-1": ("text", {"txt": b"caf\xe9"}, "member 'txt': is not UTF-8"),
    "no json": ("text", {"json": b"{"}, "member 'json': is not JSON"),
    "json list": ("text", {"json": b"[]"}, "member 'json': is a list, expected an object"),
    "word label": ("label", {"cls": b"cat"}, "member 'cls': the label is 'cat', expected an integer >= 0"),
    "huge label": ("label", {"json": b'{"label": 1' + b"0" * 30 + b"}"}, "the label is 10.* below 2"),
    "endless label": ("label", {"cls": b"1" * 5000}, "member 'cls': the label is '11"),
    "deep json": ("text", {"json": b"[" * 100_000}, "member 'json': is not JSON"),
    "half a character": ("text", {"json": b'{"caption": "a\\ud800"}'}, "half a character"),
    "endless latent": ("latent", {"latent.npy": _HUGE}, "cannot be read as a numpy array"),
    "gif": ("image", {"jpg": encoded(Image.new("L", (4, 4)), "GIF")}, "are no JPEG, PNG or WebP"),
    "html": ("image", {"jpg": b"<html>" * 9}, "'jpg': its 54 bytes are no"),
    "cut jpeg": (
        "image",
        {"jpg": encoded(Image.effect_noise((64, 64), 90), "JPEG")[:1500]},
        "'jpg': cannot be decoded",
    ),
    "bomb": ("image", {"png": _BOMB}, r"'png': cannot be decoded as an image \(Image size .* exceeds"),
    "negative label": ("label", {"json": b'{"label": -1}'}, "member 'json': the label is -1"),
    "pickle": ("latent", {"latent.npy": latent(np.array([_Trap()]), allow_pickle=True)}, "cannot be read"),
    "flat latent": (
        "latent",
        {"latent.npy": latent(np.zeros(4, np.float32))},
        r"is of shape \(4,\), expected",
    ),
    "integers": ("latent", {"latent.npy": latent(np.zeros((2, 1, 1), np.int8))}, "is int8, expected"),
    "nan latent": ("latent", {"latent.npy": latent(np.full((2, 1, 1), np.nan, np.float32))}, "not finite"),
    "no array": ("latent", {"latent.npy": b""}, "cannot be read as a numpy array"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_members_are_named_with_shard_key_and_reason(name):
    field, members, message = BAD[name]
    with pytest.raises(BadSample, match=f"shards/train-000003.tar: sample '000042', .*{message}"):
        decode_sample(members, SAMPLE, [field], View(8, 8))


def test_no_exif_that_bytes_can_hold_ends_in_anything_but_an_image():
    """Half of the exceptions that Pillow raises of these mutants are neither OSError nor ValueError."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.5
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.YCbCrCoefficients] = (0.25, 0.5, 0.25)
    exif[ExifTags.Base.DateTime] = "2026:01:01 00:00:00"
    content = encoded(Image.new("RGB", (8, 16), (200, 0, 0)), "JPEG", exif=exif)
    start, rng, raised = content.index(b"Exif"), np.random.default_rng(0), set()
    for _ in range(500):
        mutant = bytearray(content)
        for position in rng.integers(start, start + len(exif.tobytes()), 3):
            mutant[position] = rng.integers(256)
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(mutant)))
        except Exception as error:
            raised.add(type(error))
        assert image_of(bytes(mutant), 8, "jpg").float().mean((1, 2)).tolist() == pytest.approx(
            [200, 0, 0], abs=5
        )
    assert raised - {ValueError, OSError}


def test_unusual_images_are_read():
    noise = Image.effect_noise((16, 16), 90)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = [
        encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {"quality": 100}))
    ]
    for content in animated:  # the first frame
        assert (image_of(content, 8)[:, 4, 4] - torch.tensor([255, 0, 0])).abs().max() <= 2
    assert image_of(encoded(Image.new("RGB", (1, 1), (9, 9, 9))), 8).unique().tolist() == [9]
    assert image_of(encoded(Image.new("L", (10_000, 1), 9)), 8).unique().tolist() == [9]
    assert image_of(encoded(noise.convert("1")), 16).unique().tolist() == [0, 255]
    assert image_of(encoded(noise.convert("CMYK"), "JPEG"), 16, "jpg").shape == (3, 16, 16)


def test_a_mark_of_the_byte_order_is_no_part_of_a_caption():
    assert text(Members({"txt": b"\xef\xbb\xbfa cat\r\n"}, SampleId("a.tar", "k"))).value == "a cat"


def stored(*counts):
    """Tokens of captions of so many tokens, as ``ldm.encode`` writes them; caption i holds i."""
    array = np.full((len(counts), max(counts), 4), np.nan, np.float16)
    for i, count in enumerate(counts):
        array[i, :count] = i
    return array


@pytest.mark.parametrize(
    "meta",
    [{}, {"captions": ["a"]}, {"captions": ["a", "b", "c"]}, {"captions": ["b", "a"]}, {"caption": "a"}],
)
@pytest.mark.parametrize("has_txt", [True, False])
@pytest.mark.parametrize("draw", [None, 0, 1, 2, 7])
def test_the_embedding_is_of_the_caption_that_is_drawn(meta, has_txt, draw):
    content = {"json": json.dumps(meta).encode()} | ({"txt": b"a"} if has_txt else {})
    if not meta and not has_txt:
        return
    found = decode.captions(Members(content, SAMPLE))
    view = View(0, 0, draw=draw)
    expected = decode.text(Members(content, SAMPLE, view)).value
    array = stored(*(3 + i for i in range(len(found))))
    embedding = arrays.text_embedding(Members({"text.npy": latent(array)}, SAMPLE, view)).value
    i = int(embedding[0, 0])
    assert found[i] == expected and embedding.shape == (3 + i, 4)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4), np.float16), r"is of shape \(2, 4\), expected \(captions, n, D\)"),
        (np.full((1, 2, 4), np.nan, np.float16), "holds values that are not finite"),
        (np.full((1, 2, 4), np.inf, np.float16), "holds values that are not finite"),
        (np.zeros((1, 2, 4), np.float64), "is float64, expected float16 or float32"),
    ],
)
def test_a_bad_embedding_is_a_bad_sample(array, says):
    with pytest.raises(BadSample, match=says):
        arrays.text_embedding(Members({"text.npy": latent(array)}, SAMPLE))
