"""Columns about samples: what is read, where it is kept, and when it is read again."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_shards import png, write_tar

from ldm.data import raster
from ldm.data.index import summarize
from ldm.data.metadata import metadata

ORIENTATION = 0x0112


def image(width: int, height: int, kind: str, orientation: int = 1, chunk: int = 0) -> bytes:
    """An image that may be turned, and may carry a long block before its size."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    profile = os.urandom(chunk) if chunk else None
    Image.fromarray(noise).save(out, kind, exif=exif, **({"icc_profile": profile} if profile else {}))
    return out.getvalue()


def late_exif(content: bytes) -> bytes:
    """Move the EXIF of a PNG behind its pixels, where older exiftools wrote it."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    return content[:start] + content[end:-12] + content[start:end] + content[-12:]


def column(path: Path, name: str, kind: type = float, index_dir: Path | None = None) -> list:
    folder = None if index_dir is None else str(index_dir)
    return metadata(summarize(str(path), folder), folder, {name: kind})[name].tolist()


def of_json(tmp_path: Path, *contents: object) -> Path:
    files = [(f"{n}.json", json.dumps(content).encode()) for n, content in enumerate(contents)]
    return write_tar(tmp_path / "set" / "a.tar", files)


@pytest.mark.parametrize(
    "content",
    [
        image(40, 24, "JPEG"),
        image(40, 24, "JPEG", orientation=6),
        image(400, 300, "JPEG", orientation=8, chunk=90_000),
        image(40, 24, "PNG", orientation=5),
        image(300, 200, "PNG", orientation=3),
        late_exif(image(300, 200, "PNG", orientation=6)),
        image(300, 200, "WEBP", orientation=6),
        image(40, 24, "PNG")[:-12],
    ],
    ids=["jpg", "turned", "long", "png", "large png", "late exif", "webp", "no end"],
)
def test_the_size_of_an_image_is_that_of_its_pixels(tmp_path, content):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", content)])
    try:
        height, width = raster.rgb(content).shape[1:]
    except ValueError:  # it has a header, but no pixels
        height, width = 24, 40
    assert column(path, "width") == [width]
    assert column(path, "height") == [height]


def test_the_size_in_json_is_taken_where_it_is_one(tmp_path):
    sizes = [
        {"width": 512, "height": 384},
        {"width": 512.0, "height": 384},
        {"width": 512},
        {"width": "512", "height": "384"},
        {"width": True, "height": 384},
        {"width": 0, "height": 384},
        {"width": 1.5, "height": 384},
    ]
    files = [(f"{n}.json", json.dumps(size).encode()) for n, size in enumerate(sizes)]
    files += [(f"{n}.png", png(n)) for n in range(len(sizes))]
    path = write_tar(tmp_path / "a.tar", files)
    assert column(path, "width") == [512, 512, 8, 8, 8, 8, 8]
    assert column(path, "height") == [384, 384, 8, 8, 8, 8, 8]
    assert column(write_tar(tmp_path / "b.tar", [("0.jpg", b"no image")]), "width") == pytest.approx(
        [np.nan], nan_ok=True
    )


def test_a_key_gives_numbers_or_texts(tmp_path):
    values = [1, 2.5, True, "word", None, float("inf"), 10**400, [1], {"a": 1}, ""]
    path = of_json(tmp_path, *({"x": value} for value in values), {}, [])
    nan = float("nan")
    assert column(path, "x") == pytest.approx([1, 2.5, 1] + [nan] * 9, nan_ok=True)
    assert column(path, "x", str) == ["", "", "", "word"] + [""] * 8


def test_the_length_of_the_canonical_caption(tmp_path):
    files = [
        ("0.txt", b" six ch "),
        ("0.json", b'{"captions": ["one", "two"]}'),
        ("1.json", b'{"captions": ["one", "longer"]}'),
        ("2.json", '{"caption": "größer"}'.encode()),
        ("3.txt", b"  "),
        ("4.txt", b"\xff"),
        ("5.json", b"{broken"),
    ]
    nan = float("nan")
    found = column(write_tar(tmp_path / "a.tar", files), "caption_length")
    assert found == pytest.approx([6, 3, 6, nan, nan, nan], nan_ok=True)


def test_columns_are_kept_until_the_shard_changes(tmp_path):
    path = of_json(tmp_path, {"x": 1, "y": "a"}, {"x": 2})
    assert column(path, "x") == [1, 2]
    assert column(path, "y", str) == ["a", ""]
    sidecar = Path(f"{path}.metadata.index.npz")
    written = sidecar.read_bytes()
    assert column(path, "x") == [1, 2] and column(path, "y", str) == ["a", ""]
    assert sidecar.read_bytes() == written
    of_json(tmp_path, {"x": 5}, {"x": 6}, {"x": 7})
    assert column(path, "x") == [5, 6, 7]
    sidecar.write_bytes(b"damaged")
    assert column(path, "x") == [5, 6, 7] and column(path, "y", str) == ["", "", ""]


def test_kept_columns_are_what_is_returned(tmp_path):
    """What the sidecar says is believed: the members are not read again."""
    path = of_json(tmp_path, {"x": 1}, {"x": 2})
    assert column(path, "x") == [1, 2]
    sidecar = Path(f"{path}.metadata.index.npz")
    with np.load(sidecar) as arrays:
        changed = {**arrays, "numbers x": np.array([7.0, 8.0])}
    np.savez(sidecar, **changed)
    assert column(path, "x") == [7, 8]
    assert column(path, "z", str) == ["", ""] and column(path, "x") == [7, 8]


def test_they_lie_with_the_indices(tmp_path):
    path = of_json(tmp_path, {"x": 1})
    assert column(path, "x", index_dir=tmp_path / "indices") == [1]
    assert not list(path.parent.glob("*.npz"))
    assert len(list((tmp_path / "indices").glob("a-*.metadata.index.npz"))) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_became_read_only_costs_time_alone(tmp_path):
    path = of_json(tmp_path, {"x": 1})
    summarize(str(path), None)
    path.parent.chmod(0o555)
    try:
        assert column(path, "x") == [1]
    finally:
        path.parent.chmod(0o755)
    shutil.rmtree(path.parent)


def test_a_size_costs_no_pixels(tmp_path, monkeypatch):
    path = write_tar(
        tmp_path / "a.tar", [(f"{n}.jpg", image(64, 48, k)) for n, k in enumerate(("PNG", "JPEG"))]
    )
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert column(path, "width") == [64, 64]
