"""data.folder on what people have: metadata of Hugging Face, Parquet files, captions of kohya, all cores."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_own_folders import captions_of, error_of, packed, put
from tiny_shards import png

from data import folder, writing
from ldm.data.bad_samples import BadSamplePolicy, TooManyBad


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_captions_of_kohya_are_read_and_txt_comes_first(source, out):
    put(source, "a.png", "b.png")
    (source / "a.caption").write_text("one")
    (source / "b.CAPTION").write_text("two")
    (source / "b.txt").write_text("three")
    assert captions_of(packed(source, out, "auto")[0]) == {"a.png": "one", "b.png": "three"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_of_hugging_face_is_found_in_each_folder(source, out, kind):
    """A metadata file names images relative to itself; one beside the images comes before .txt files."""
    put(source, "train/a.png", "train/sub/b.png", "test/a.png")
    (source / "test/a.txt").write_text("not this one")
    rows = {"train": [("a.png", "one"), ("sub/b.png", "two")], "test": [("a.png", "three")]}
    for name, found in rows.items():
        write_metadata(source / name / f"metadata.{kind}", found)
    found, skipped = packed(source, out, "auto")
    assert captions_of(found) == {"train/a.png": "one", "train/sub/b.png": "two", "test/a.png": "three"}
    assert not skipped


def write_metadata(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"file_name": [r[0] for r in rows], "text": [r[1] for r in rows]}), path)
    elif path.suffix == ".csv":
        path.write_text("file_name,text\n" + "".join(f"{name},{text}\n" for name, text in rows))
    else:
        path.write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows))


def hugging_face(path, rows, more=None, about=None):
    """A Parquet file as datasets.Dataset.to_parquet writes it: images as {bytes, path}."""
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, **(more or {})})
    if about:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def test_images_in_parquet_files_of_hugging_face(source, out):
    contents = [png(0), jpeg(100), png(2), b"no image", png(4), None, png(6)]
    texts = ["zero", " one ", "two", "three", "", "five", None]
    rows = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    hugging_face(source / "data" / "train-00000-of-00001.parquet", rows, {"text": texts})
    found, skipped = packed(source, out, "auto")
    name = "data/train-00000-of-00001.parquet"
    assert captions_of(found) == {f"{name}/0": "zero", f"{name}/1": "one", f"{name}/2": "two"}
    assert found[f"{name}/0"]["png"] == contents[0] and found[f"{name}/1"]["jpg"] == contents[1]
    assert skipped == {"with an empty caption": 2, "cannot be decoded": 1, "without the bytes of an image": 1}
    assert len(packed(source, out.with_name("bare"), "none")[0]) == 5


def test_classes_of_a_parquet_file_are_its_captions(source, out):
    about = {"label": {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"}}
    rows = [{"bytes": png(n), "path": None} for n in range(3)]
    hugging_face(source / "a.parquet", rows, {"label": [1, 0, -1]}, about)
    found, skipped = packed(source, out, "auto")
    assert {n: (s["txt"], s["cls"]) for n, s in found.items()} == {
        "a.parquet/0": (b"dog", b"1"), "a.parquet/1": (b"tabby cat", b"0"),
    }  # fmt: skip
    assert skipped == {"with a label that is no integer >= 0": 1}
    assert (out / "classes.txt").read_text() == "tabby_cat\ndog\n"


def test_parquet_files_of_img2dataset_and_split_by_rows(source, out):
    """img2dataset names the column of bytes by the format; failed downloads are null."""
    columns = {"key": [f"{n:09d}" for n in range(9)], "caption": [f"number {n}" for n in range(9)]}
    columns["jpg"] = pa.array([None if n == 4 else jpeg(n) for n in range(9)], pa.binary())
    pq.write_table(pa.table(columns), source / "00000.parquet", row_group_size=4)
    folder.pack_folder(source, out, val_fraction=0.3)
    found, skipped = packed(source, out.with_name("all"), "parquet")
    assert [*found] == [f"00000.parquet/{n}" for n in range(9) if n != 4]
    assert skipped == {"without the bytes of an image": 1}
    assert "8 images" not in (out / "packed.txt").read_text()
    assert sum(map(int, json.loads((out / "shards.json").read_text())["counts"].values())) == 8


def test_parquet_errors_are_one_line(source, out, monkeypatch):
    hugging_face(source / "a.parquet", [{"bytes": png(0), "path": None}], {"words": ["x"]})
    message = error_of(source, out)
    assert "a.parquet: has the columns words, expected caption, text or prompt: see --columns" in message
    found, _ = packed(source, out, "auto", columns=["image", "words"])
    assert captions_of(found) == {"a.parquet/0": "x"}
    (source / "b.parquet").write_bytes(b"PAR1 and no more")
    assert "b.parquet: cannot be read as Parquet (" in error_of(source, out)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'ldm[parquet]'" in error_of(source, out)


def written(out):
    names = [*sorted(out.glob("*.tar")), out / "skipped.txt", out / "packed.txt"]
    text = {path.name: path.read_bytes().replace(str(out).encode(), b"OUT") for path in names}
    return {name: hashlib.sha256(content).hexdigest() for name, content in text.items()}


def test_the_shards_are_the_same_for_any_number_of_processes(source, tmp_path):
    put(source, *(f"{n}.png" for n in range(70)))
    for n in range(0, 70, 7):
        (source / f"{n}.png").write_bytes(b"no image")
    (source / "locked.png").symlink_to(source)  # cannot be read as a file
    for workers in (1, 2, 3):
        folder.pack_folder(source, tmp_path / str(workers), "none", 0.2, 8, 10, workers=workers)
    assert written(tmp_path / "1") == written(tmp_path / "2") == written(tmp_path / "3")
    skipped = (tmp_path / "2" / "skipped.txt").read_text().splitlines()
    assert sum(line.startswith("cannot be decoded\t") for line in skipped) == 10
    assert "--workers: 0, expected at least 1" in error_of(source, tmp_path / "x", "--workers", "0")


def interrupted_after(num, monkeypatch):
    """Let the next packing end once a shard follows the ``num``-th."""
    write, left = writing._write_shard, iter(range(num))

    def limited(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(writing, "_write_shard", limited)


def test_an_interrupted_pack_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, capsys):
    """Bad images before, between and behind the samples of a shard; then with another number of processes."""
    put(source, *(f"{n}.png" for n in range(40)))
    for n in range(0, 40, 3):
        (source / f"{n}.png").write_bytes(b"no image")
    folder.pack_folder(source, tmp_path / "whole", "none", 0.2, None, 3)
    for num in (1, 5, 8):
        out = tmp_path / str(num)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupted_after(num, patch)
            folder.pack_folder(source, out, "none", 0.2, None, 3)
        before = {path: path.stat().st_ino for path in out.glob("*.tar")}
        assert len(before) == num
        folder.pack_folder(source, out, "none", 0.2, None, 3, workers=2 if num == 5 else 1)
        assert f"going on after {num} finished shards" in capsys.readouterr().err
        assert {path: path.stat().st_ino for path in before} == before
        assert written(out) == written(tmp_path / "whole")
        manifests = [json.loads((each / "shards.json").read_text()) for each in (out, tmp_path / "whole")]
        assert manifests[0] == manifests[1]


def test_rows_of_parquet_files_go_on_and_changed_input_begins_anew(source, tmp_path, monkeypatch, capsys):
    def write(rows):
        contents = [{"bytes": png(n), "path": None} for n in range(rows)]
        hugging_face(source / "a.parquet", contents, {"text": [f"number {n}" for n in range(rows)]})

    write(20)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(3, patch)
        folder.pack_folder(source, out, val_fraction=0, shard_size=4)
    folder.pack_folder(source, out, val_fraction=0, shard_size=4)
    folder.pack_folder(source, tmp_path / "whole", val_fraction=0, shard_size=4)
    assert written(out) == written(tmp_path / "whole")
    assert "out: going on after 3 finished shards" in capsys.readouterr().err
    again = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_after(3, patch)
        folder.pack_folder(source, again, val_fraction=0, shard_size=4)
    write(21)
    folder.pack_folder(source, again, val_fraction=0, shard_size=4)
    said = "was begun with 20 images of images, captions parquet instead of 21 images of images, captions"
    assert said in capsys.readouterr().err
    assert sum(json.loads((again / "shards.json").read_text())["counts"].values()) == 21


def test_packing_has_the_policy_of_training(source, out, capsys):
    put(source, "a.png", "b.png", "c.png", "d.png")
    (source / "b.png").write_bytes(b"no image")
    for name in "abc":
        (source / f"{name}.txt").write_text(name)
    strict = ["--val-fraction", "0", "--bad-samples.action", "error"]
    message = error_of(source, out, *strict)
    assert "--bad-samples.action is error: d.png: without a .txt file; all are in" in message
    assert (out / "skipped.txt").read_text() == "without a .txt file\td.png\n"
    (source / "d.txt").write_text("d")
    with pytest.raises(TooManyBad, match=r"action is error: b.png .*: cannot be decoded; all are in"):
        folder.pack_folder(source, out, val_fraction=0, bad_samples=BadSamplePolicy("error"))
    (source / "e.png").touch()
    (source / "c.txt").write_text(" ")
    assert "is error: 2 bad samples, e.g. c.png: with an empty caption; all" in error_of(source, out, *strict)
    put(source, "b.png")
    (source / "e.png").unlink()
    (source / "c.txt").write_text("c")
    assert folder.main(["--images", str(source), "--out", str(out), *strict]) == 0
    (source / "f.png").touch()
    assert "is error: f.png" in error_of(source, out, *strict)
    assert (out / "skipped.txt").read_text() == ""  # that of the set
    assert "--bad-samples.max_share" not in capsys.readouterr().err
    assert "max_share: got 2.0, expected a share" in error_of(source, out, "--bad-samples.max_share", "2")


@pytest.mark.parametrize(("bad", "says"), [("decoded", "cannot be decoded"), ("txt", "without a .txt file")])
def test_packing_ends_where_too_many_are_bad(source, out, bad, says):
    put(source, "0.png")
    for n in range(1000):
        if n:
            os.link(source / "0.png", source / f"{n}.png")
        if bad == "decoded" or n >= 120:
            (source / f"{n}.txt").write_text("x")
    if bad == "decoded":
        for n in range(120):
            (source / f"{n}.png").unlink()
            (source / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"--bad-samples.max_share: 1\d\d of 1000 .*{says}; all are in"):
        folder.pack_folder(source, out)
    assert len((out / "skipped.txt").read_text().splitlines()) == (101 if bad == "decoded" else 120)
    _, skipped = folder.pack_folder(source, out, bad_samples=BadSamplePolicy(max_share=0.12))
    assert len(skipped) == 120


@pytest.mark.slow
def test_a_killed_pack_leaves_nothing_half_and_the_same_command_goes_on(source, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "0.png")
    for n in range(1, 100):
        os.link(source / "0.png", source / f"{n}.png")
    (source / "7.png").unlink()
    (source / "7.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command = [*(sys.executable, "-m", "data.folder", "--images", str(source), "--captions", "none"), "--out"]
    more = ["--shard-size", "10", "--workers", "2", "--resize", "200"]
    kept = {}
    for num in (1, 4):
        with (tmp_path / "err").open("w") as err:
            process = subprocess.Popen([*command, str(out), *more], stderr=err, start_new_session=True)
        while len(list(out.glob("*.tar"))) < num:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert json.loads((out / "shards.json").read_text())["shards"] is None
        deadline = time.monotonic() + 60
        while processes_of(process.pid):  # they notice that their parent is gone
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert all(path.stat().st_ino == inode for path, inode in kept.items())
        kept = {out / json.loads(line)[0]: 0 for line in (out / "packing.jsonl").read_text().splitlines()}
        kept = {path: path.stat().st_ino for path in kept}
        assert len(kept) >= num - 1
    for again in (out, tmp_path / "whole"):
        assert folder.main([*command[3:], str(again), *more]) == 0
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert written(out) == written(tmp_path / "whole")
    assert not list(out.glob("*.tmp-*"))


def processes_of(session):
    """Processes of a session that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(path.parent.name)
    return found
