"""The search before the first step finds what training would find, and nothing that it would not."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from tiny_shards import png, write_tar

from ldm.data import search
from ldm.data.bad_samples import BadSamplePolicy, TooManyBad
from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import decode_sample
from ldm.data.module import Indexed, Streaming
from ldm.data.search import check, search_training, search_validation
from ldm.data.sets import TrainSet
from ldm.data.source import SampleSpec
from ldm.data.view import Augment, View

FIELDS = ("image", "text")
BAD = {  # members but for the good ones of ``good``, and the reason
    "html": ({"png": b"<html>" * 9}, "unreadable image"),
    "nothing": ({"png": b""}, "unreadable image"),
    "alone": ({"png": None}, "missing image"),
    "blank": ({"txt": b" \n"}, "empty caption"),
    "latin-1": ({"txt": b"caf\xe9"}, "malformed caption"),
    "silent": ({"txt": None}, "missing text"),
    "no json": ({"json": b"{"}, "malformed json"),
    "one of two": ({"json": b'{"captions": ["a", ""]}'}, "empty caption"),
    "both": ({"png": b"x", "txt": b""}, "unreadable image"),
}


def shard_of(path: Path, samples: dict[str, dict[str, bytes | None]], num_good: int = 3) -> str:
    good = {f"good {n}": {} for n in range(num_good)}
    files = []
    for number, (key, others) in enumerate({**good, **samples}.items()):
        members = {"png": png(number), "txt": b"a cat", **others}
        files += [(f"{key}.{name}", body) for name, body in members.items() if body is not None]
    return str(write_tar(path, files))


def source_of(train, **options):
    return Indexed().open(train, SampleSpec(FIELDS, 8, 0, **options))


def found_in(searched) -> dict[str, str]:
    return {problem.key: problem.reason for _, problem in searched.found}


def test_all_that_headers_and_captions_tell_is_found_with_reason_and_key(tmp_path):
    path = shard_of(tmp_path / "a.tar", {key: members for key, (members, _) in BAD.items()})
    source = source_of(path)
    searched = search_training(source)
    assert found_in(searched) == {key: reason for key, (_, reason) in BAD.items()}
    assert (searched.searched, searched.total) == (12, 12)
    assert (
        searched.messages[0]
        == f"{path}: sample 'html', member 'png': its 54 bytes are no JPEG, PNG or WebP image"
    )
    assert str(searched).startswith("9 of 12 training samples are bad: 3 unreadable image, 2 empty caption")
    assert str(searched).endswith("e.g. 'html', 'nothing', 'alone'")
    files = source.sets[""].files
    reasons = {}
    for row in range(12):
        for draw in (0, 1):
            try:
                files.sample(0, row, FIELDS, View(8, 8, draw=draw))
            except BadSample as error:
                reasons[files.key(0, row)] = error.reason
    assert found_in(searched) == reasons
    validation = found_in(search_validation(Indexed().evaluation(path, 8, reads=lambda stored: FIELDS)))
    canonical = {key for key in reasons if key not in ("no json", "one of two")}  # the txt is there
    assert validation == {key: reasons[key] for key in canonical}


def damaged(rng: Random) -> bytes:
    """An image of some kind with some bytes changed, or cut."""
    pixels, out, exif = (
        np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8),
        io.BytesIO(),
        Image.Exif(),
    )
    exif[0x0112] = rng.randint(1, 8)
    options = {"exif": exif} if rng.random() < 0.5 else {}
    Image.fromarray(pixels).save(out, rng.choice(["JPEG", "PNG", "WEBP"]), **options)
    content = bytearray(out.getvalue())
    for _ in range(rng.randint(1, 4)):
        content[int(len(content) * rng.random() ** 3)] = rng.randrange(256)
    return bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])


def test_no_image_that_training_reads_is_found(tmp_path):
    rng = Random(0)
    images = {f"{n}": damaged(rng) for n in range(400)}
    files = [(f"{key}.png", body) for key, body in [("good", png(0)), *images.items()]]
    path = str(write_tar(tmp_path / "a.tar", files))
    found = found_in(search_validation(Indexed().evaluation(path, 8)))
    bad = set()
    for key, body in images.items():
        try:
            decode_sample({"png": body}, SampleId(path, key), ["image"], View(8, 8))
        except BadSample:
            bad.add(key)
    assert found.keys() < bad and len(found) > 40, "headers tell some of them, decoding all"


def test_what_is_left_out_or_read_from_elsewhere_is_not_searched(tmp_path):
    broken = {
        "blank": {"txt": b""},
        "html": {"png": b"<html>", "json": b'{"x": 1}'},
        "latin-1": {"txt": b"\xe9"},
    }
    path = shard_of(tmp_path / "a.tar", broken)
    other = shard_of(tmp_path / "b.tar", {"blank b": {"txt": b""}})
    images, captions = (
        {"html": "unreadable image"},
        {"blank": "empty caption", "latin-1": "malformed caption"},
    )
    assert found_in(search_training(source_of(path))) == images | captions
    own = {"own": TrainSet(path, caption="a thing"), "none": TrainSet(other, weight=0.0)}
    assert found_in(search_training(source_of(own))) == images
    drawn = source_of(path, augment=Augment(captions={"x": 1.0, "txt": 1.0}))
    assert found_in(search_training(drawn)) == images
    kept = {"": TrainSet(path, filter="caption_length > 0")}
    assert found_in(search_training(source_of(kept))) == images
    assert not search_training(Streaming(1).open(path, SampleSpec(FIELDS, 8, 0))).searched


def test_shards_are_searched_once_and_only_the_first(tmp_path, monkeypatch):
    paths = [shard_of(tmp_path / f"{n}.tar", {f"blank {n}": {"txt": b""}}, 4) for n in range(3)]
    searched = search_training(source_of(paths), num=6)
    assert (searched.searched, searched.total, len(searched.found)) == (10, 15, 2), "whole shards"
    assert str(searched).startswith("2 of 10 training samples (of 15) are bad: 2 empty caption")
    monkeypatch.setattr("ldm.data.metadata._collect", lambda *args: pytest.fail("read again"))
    assert search_training(source_of(paths), num=6) == searched


def test_remote_shards_are_not_fetched(tmp_path, monkeypatch):
    source = source_of(shard_of(tmp_path / "a.tar", {"blank": {"txt": b""}}))
    monkeypatch.setattr(search, "is_remote", lambda path: True)
    assert (search_training(source).searched, search_training(source).total) == (0, 4)


def test_the_policy_counts_all_and_names_the_file(tmp_path):
    path = shard_of(tmp_path / "a.tar", {f"b{n}": {"txt": b""} for n in range(30)}, 970)
    searched = [search_training(source_of(path))]
    check(searched, BadSamplePolicy(max_share=0.03), "run/bad-samples.txt")
    with pytest.raises(TooManyBad, match=r"max_share: 30 of 1000 samples .*: 30, all in run/bad-samples.txt"):
        check(searched, BadSamplePolicy(max_share=0.029), "run/bad-samples.txt")
    with pytest.raises(
        TooManyBad, match=r"action is error: 30 bad .*: 30, all in run/bad-samples.txt"
    ) as caught:
        check(searched, BadSamplePolicy("error"), "run/bad-samples.txt")
    assert len(str(caught.value)) <= 300 and "sample 'b0'" in str(caught.value)
