"""The table of sizes, and which of them an image gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.buckets import AspectRatio, Buckets, Size, without_small


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 400_000),
    st.sampled_from([1, 8, 16, 32, 64]),
    st.floats(1.0, 6.0, allow_nan=False),
)
def test_sizes_fill_the_budget(pixels, multiple, max_ratio):
    if pixels < multiple**2 or pixels > 2_000 * multiple**2:
        return
    sizes = Buckets(pixels, multiple, max_ratio).sizes(1)
    ratios = [size.height / size.width for size in sizes]
    assert ratios == sorted(set(ratios))  # no two of the same proportions
    assert {Size(size.width, size.height) for size in sizes} == {*sizes}
    side = math.isqrt(pixels) // multiple * multiple
    assert Size(side, side) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= pixels
        assert max(height, width) <= max_ratio * min(height, width)
        assert height == width or max(height, width) + multiple > pixels // min(height, width)


def test_the_table_of_a_known_budget():
    found = [str(size) for size in Buckets(multiple=64).sizes(512)]
    assert found == ["640x384", "576x448", "512x512", "448x576", "384x640"]


def test_sizes_of_a_large_model_are_in_its_table():
    """Of SDXL's sizes (Podell et al. 2023, arXiv:2307.01952) those that fill 1024^2 pixels."""
    sizes = Buckets(1024**2, 64, 4.0).sizes(1024)
    for height, width in [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (832, 1216), (896, 1152)]:
        assert Size(height, width) in sizes
        assert Size(width, height) in sizes


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20))
def test_an_image_gets_the_nearest_proportions(shapes):
    sizes = tuple(Buckets(multiple=32, max_ratio=3.0).sizes(256))
    columns = {name: np.array([s[i] for s in shapes], float) for i, name in enumerate(("height", "width"))}
    found = AspectRatio(sizes).groups(columns)
    for (height, width), bucket in zip(shapes, found.tolist(), strict=True):
        distance = [abs(math.log(height / width) - math.log(size.height / size.width)) for size in sizes]
        assert distance[bucket] <= min(distance) + 1e-12


def test_without_a_size_the_square_is_nearest():
    grouping = AspectRatio(tuple(Buckets().sizes(512)))
    unknown = np.array([np.nan, 0.0, 300.0, np.nan])
    assert grouping.groups({"height": unknown, "width": unknown[::-1].copy()}).tolist() == [2] * 4
    assert grouping.num_groups == 5
    assert grouping.columns == {"height": float, "width": float}


def test_small_buckets_are_left_to_others():
    sizes = Buckets().sizes(512)
    assert without_small(sizes, [3, 4, 9, 0, 5], 4) == (sizes[1], sizes[2], sizes[4])
    assert without_small(sizes, [3, 4, 9, 0, 5], 10) == (sizes[2],)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"buckets\.max_ratio: got 0\.5, expected at least 1"):
        Buckets(max_ratio=0.5)
    with pytest.raises(ValueError, match=r"buckets\.multiple: got 0"):
        Buckets(multiple=0)
    with pytest.raises(ValueError, match=r"buckets\.multiple: got 64, but 1024 pixels hold no 64x64 image"):
        Buckets(pixels=1024).sizes(256)
