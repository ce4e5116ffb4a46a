"""A tar read from front to back gives the samples that its index gives."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from tiny_shards import png, sample, write_tar

from ldm.cli import run_command
from ldm.data import tar_stream
from ldm.data.fields import whitelist
from ldm.data.files import ShardFiles
from ldm.data.index import summarize
from ldm.data.module import Streaming
from ldm.data.source import SampleSpec

SPEC = SampleSpec(("image", "text"), 8, 5)


def streamed(path):
    with open(path, "rb") as file:
        return dict(tar_stream.read_samples(file, str(path)))


def indexed(path):
    files = ShardFiles([summarize(str(path), None)], None)
    rows = range(files.summaries[0].count)
    return {files.key(0, row): files.members(0, row, whitelist())[0] for row in rows}


def linking(path, links):
    with tarfile.open(path, "w") as tar:
        for name, body in sample(0):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def test_links_to_members_before_them_are_followed(tmp_path):
    links = [("b.png", tarfile.LNKTYPE, "000000.png"), ("b.txt", tarfile.LNKTYPE, "000000.txt")]
    links += [("x/c.png", tarfile.SYMTYPE, "../b.png"), ("x/c.txt", tarfile.SYMTYPE, "../000000.txt")]
    found = streamed(path := linking(tmp_path / "a.tar", links))
    assert found == indexed(path)
    assert found["x/c"] == found["b"] == {"png": png(0), "txt": b"number 0\n"}


def test_links_that_lead_too_far_back_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_stream, "REMEMBERED", len(sample(0)[2][1]))
    path = linking(tmp_path / "a.tar", [("b.png", tarfile.LNKTYPE, "000000.png")])
    with pytest.warns(UserWarning, match=r"a.tar: 1 members are ignored, e.g. 'b.png' \(a link to no member"):
        assert set(streamed(path)) == {"000000"}


def test_names_in_two_unicode_forms_are_one_sample_unless_both_have_the_member(tmp_path):
    composed, decomposed = "\u00e9", "e\u0301"
    files = [(f"{decomposed}.png", b"x"), (f"{composed}.txt", b"y"), ("z.png", b"z")]
    assert streamed(path := write_tar(tmp_path / "a.tar", files)) == indexed(path)
    assert streamed(path)[decomposed] == {"png": b"x", "txt": b"y"}
    files += [("z.txt", b""), (f"{decomposed}2.png", b"1"), (f"{composed}2.png", b"2")]
    assert streamed(path := write_tar(tmp_path / "b.tar", files)) == indexed(path)
    assert streamed(path)[f"{composed}2"] == {"png": b"2"}


def test_names_that_are_no_utf8_are_read_alike(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("caf\udce9.png", png(1)), ("caf\udce9.txt", b"y")])
    assert streamed(path) == indexed(path) == {"caf\\xe9": {"png": png(1), "txt": b"y"}}
    assert Streaming(1).open(str(path), SPEC).shards == [str(path)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer, not the file",
        ),
        (b"\n<!DOCTYPE html><html>" + b" " * 600, "a web page, not the file itself: download the raw file"),
    ],
)
def test_what_stands_in_the_place_of_a_tar_is_named_in_one_line(tmp_path, capsys, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    assert run_command(lambda: print(Streaming().open(str(tmp_path / "a.tar"), SPEC))) == 2
    assert f"a.tar: cannot be read as a tar ({reason}" in capsys.readouterr().err


def test_compressed_tars_and_members_that_are_there_twice(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(3))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert (
        streamed(packed)
        == streamed(path)
        == {"000003": dict(zip(["png", "txt", "json"], [b for _, b in sample(3)], strict=True))}
    )
    twice = write_tar(tmp_path / "b.tar", [*sample(3), *sample(3)])
    with pytest.raises(
        ValueError, match=r"b.tar: cannot be read as a tar \(member '000003.png' is there twice"
    ):
        Streaming().open(str(twice), SPEC)
