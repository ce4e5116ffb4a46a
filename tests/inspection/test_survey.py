"""What ldm.inspect counts: exactly what was put into the shards, whatever is broken in them."""

import io
import json
import os
import re
import stat

import numpy as np
import pytest
import torch
from comparing import error_of
from PIL import Image
from tiny_shards import png, write_tar

from ldm import inspect
from ldm.inspection.look import average_hash
from ldm.nets.text import num_tokens


def image(kind, size, seed=0, mode="RGB"):
    bands = (3,) if mode == "RGB" else ()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], *bands), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


LONG = "word " * 100


@pytest.fixture
def shards(tmp_path):
    """Two shards that are read, one without members and one that ends early."""
    twice = image("PNG", (30, 20), 1)
    deep = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(deep, "PNG")
    first = {
        "a.jpg": image("JPEG", (40, 30)), "a.txt": b"a caption", "a.cls": b"1",
        "b.png": twice, "b.txt": LONG.encode(), "b.cls": b"0",
        "c.png": twice, "c.txt": b"  ",
        "d.webp": image("WEBP", (20, 20), 2, "L"), "d.json": b'{"caption": "a caption", "label": 1}',
        "e.png": b"<html>not found", "e.txt": b"five \xff",
        "f.txt": b"six",
        "g.v2.png": png(1),
        "h.png": deep.getvalue(), "h.txt": "sieben \N{GRINNING FACE}".encode(), "h.cls": b"minus one",
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", list(first.items()))
    write_tar(tmp_path / "1.tar", [("a.png", png(9)), ("z.png", png(8)), ("z.txt", b"a caption")])
    (tmp_path / "2.tar").write_bytes(bytes(1024))
    whole = write_tar(tmp_path / "x.tar", [("y.png", png(7))]).read_bytes()
    (tmp_path / "3.tar").write_bytes(whole[:600])
    (tmp_path / "x.tar").unlink()
    return tmp_path


def inspected(shards, *more):
    out = shards / "out" / "found.json"
    assert inspect.main([f"{shards}/*.tar", "--workers", "1", "--json", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_it_counts_what_is_there(shards, capsys):
    found = inspected(shards)
    assert (found["samples"], found["looked_at"]) == (9, 9)
    assert [shard["samples"] for shard in found["shards"]] == [7, 2, 0]
    assert found["shards"][0]["members"] == {"jpg": 1, "png": 4, "webp": 1, "txt": 6, "json": 1, "cls": 3}
    assert [each["path"] for each in found["broken_shards"]] == [str(shards / "3.tar")]
    assert "cut short" in found["broken_shards"][0]["reason"]
    assert {reason: each["count"] for reason, each in found["bad_samples"].items()} == {
        "empty caption": 1, "unreadable image": 1, "malformed caption": 1, "malformed label": 1,
    }  # fmt: skip
    assert "0.tar: sample 'c', member 'txt'" in found["bad_samples"]["empty caption"]["examples"][0]
    assert found["shards"][0]["ignored_members"] == 1 and "g.v2" in found["shards"][0]["ignored_example"]
    assert found["fields"]["image"] == {"have": 7, "lack": 2}
    assert found["fields"]["label"] == {"have": 3, "lack": 6} and found["classes"] == {"0": 1, "1": 2}
    assert found["images"]["sizes"] == {"30x20": 2, "20x20": 2, "8x8": 2, "40x30": 1}
    assert found["images"]["aspect_ratios"] == {"1:1": 4, "4:3": 1, "3:2": 2}
    assert found["images"]["kinds"] == {
        "PNG RGB, 8 bits": 4, "JPEG RGB, 8 bits": 1, "WEBP RGB, 8 bits": 1, "PNG I;16, 16 bits": 1,
    }  # fmt: skip
    assert found["images"]["channels"] == {"3 channels of 8 bits": 6, "1 channel of 16 bits": 1}
    words = ["a caption", LONG.strip(), "a caption", "six", "sieben \N{GRINNING FACE}", "a caption"]
    captions = found["captions"]
    assert (captions["count"], captions["distinct"]) == (6, 4)
    assert captions["characters"] == {"min": 3, "median": 9, "max": 499}
    assert captions["tokens"]["max"] == max(map(num_tokens, words)) == 102
    assert (captions["truncated"], captions["limit"]) == (1, 77)
    assert found["duplicate_keys"]["count"] == 1
    assert found["duplicate_images"] == {
        "count": 1, "examples": [[f"b of {shards / '0.tar'}", f"c of {shards / '0.tar'}"]]
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "bad samples, unreadable image: 1" in shown and "broken shard" in shown
    assert "16.7% are cut" in shown


def test_a_declaration_shows_what_it_would_refuse(shards):
    kind = ("--image.channels", "1", "--image.bits", "16")
    found = inspected(shards, *kind, "--html", str(shards / "page.html"))
    refused = found["bad_samples"]["other kind of image"]
    assert refused["count"] == 4  # three are grey, one of them as RGB of equal channels, one of one colour
    assert "has colours, expected 1 channel of 16 bits (data.image)" in refused["examples"][0]
    assert found["images"]["channels"] == {"3 channels of 8 bits": 2, "1 channel of 16 bits": 1}


def test_workers_and_samples_do_not_change_what_is_found(shards):
    assert inspected(shards) == inspected(shards, "--workers", "2")
    some = [inspected(shards, "--samples", "4", "--seed", seed) for seed in ("1", "1", "2")]
    assert some[0]["looked_at"] == 4 and some[0] == some[1] != some[2]


def test_strict_ends_with_one_if_anything_is_broken(shards, capsys):
    good = write_tar(shards / "good.tar", [("0.png", png(1)), ("0.txt", b"x")])
    assert inspect.main([str(good), "--strict"]) == 0
    assert "nothing is broken" in capsys.readouterr().out
    assert inspect.main([f"{shards}/3.tar", "--strict"]) == 1
    assert error_of(capsys, [str(shards)], inspect.main) == (
        f"error: shards: '{shards}' is a folder, expected the tar shards in it: '{shards}/*.tar'"
    )


def test_a_read_only_folder_is_left_as_it_is(shards, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    write_tar(folder / "0.tar", [("0.png", png(1))])
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        is_root = os.getuid() == 0  # who may write anywhere
        index = ("--index-dir", str(tmp_path / "indices")) if is_root else ()
        assert inspect.main([str(folder / "0.tar"), *index]) == 0
        assert [path.name for path in folder.iterdir()] == ["0.tar"]
    finally:
        folder.chmod(stat.S_IRWXU)


def test_the_page_is_complete_in_itself_and_escapes_what_captions_hold(shards):
    write_tar(shards / "4.tar", [("k.png", png(1)), ("k.txt", b"<script>alert(1)</script>")])
    inspected(shards, "--html", str(shards / "page.html"))
    text = (shards / "page.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 8
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_average_hashes_agree_for_small_changes_and_differ_for_others():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8))
    large = pixels.repeat_interleave(12, 1).repeat_interleave(12, 2)
    brighter = (large.float() * 0.9 + 20).to(torch.uint8)
    assert average_hash(large) == average_hash(brighter) != average_hash(large.flip(2))
    assert average_hash(torch.full((3, 96, 96), 7, dtype=torch.uint8)) is None
