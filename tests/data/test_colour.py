"""Images with a profile become sRGB, and all others stay as they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from profiles import DISPLAY_P3, SRGB, grey_profile, p3_to_srgb, profile

from ldm.data import colour
from ldm.data.raster import rgb

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
P3 = profile(DISPLAY_P3)


def decoded(image: Image.Image, icc: bytes | None, **options) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, options.pop("format", "PNG"), icc_profile=icc, **options)
    return rgb(out.getvalue()).permute(1, 2, 0).numpy()


def test_display_p3_becomes_srgb():
    image = Image.fromarray(NOISE[:, :, :3])
    found, plain = decoded(image, P3), decoded(image, None)
    assert np.array_equal(plain, NOISE[:, :, :3])
    assert np.abs(found - p3_to_srgb(plain)).max() <= 2
    assert np.abs(found.astype(int) - plain).max() > 30


def test_alpha_is_laid_over_white_after_the_conversion():
    found, alpha = decoded(Image.fromarray(NOISE), P3), NOISE[:, :, 3:] / 255.0
    expected = alpha * p3_to_srgb(NOISE[:, :, :3]) + (1 - alpha) * 255
    assert np.abs(found - expected).max() <= 3


def test_a_palette_is_converted_and_keeps_what_is_transparent():
    image = Image.fromarray(NOISE[:, :, 0] % 3, "P")
    image.putpalette([0, 200, 0, 200, 0, 0, 90, 90, 200])
    found, indices = decoded(image, P3, transparency=1), NOISE[:, :, 0] % 3
    assert (found[indices == 1] == 255).all()
    for index, colours in ((0, [0, 200, 0]), (2, [90, 90, 200])):
        assert np.abs(found[indices == index] - p3_to_srgb(np.array(colours))).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_curve_becomes_srgb(mode):
    grey = np.full((4, 4), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey)
    image = image.convert("LA") if mode == "LA" else image
    linear = (128 / 255) ** 1.8
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(decoded(image, grey_profile(1.8)) - expected).max() <= 2
    assert np.array_equal(decoded(image, P3), decoded(image, None))  # of another kind


def test_srgb_and_broken_profiles_change_nothing():
    image = Image.fromarray(NOISE[:, :, :3])
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    broken = [b"x", P3[:200], P3[:128] + bytes(len(P3) - 128), b"\xff" * 600, grey_profile(1.0)]
    for icc in (built_in, profile(SRGB), *broken):
        assert np.array_equal(decoded(image, icc), NOISE[:, :, :3])
    rng = np.random.default_rng(0)
    for _ in range(200):  # none ends in an error
        mutant = bytearray(P3)
        for position in rng.integers(0, len(P3), 4):
            mutant[position] = rng.integers(256)
        assert decoded(image, bytes(mutant)).shape == (16, 16, 3)


def test_a_profile_is_looked_at_once():
    colour._transform.cache_clear()
    for _ in range(3):
        decoded(Image.fromarray(NOISE[:, :, :3]), P3, format="JPEG")
        decoded(Image.fromarray(NOISE[:, :, :3]), None, format="JPEG")
    assert colour._transform.cache_info().misses == 1
