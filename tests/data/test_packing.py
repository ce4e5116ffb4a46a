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

from data import folder


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


@pytest.mark.slow
def test_a_killed_pack_leaves_nothing_half_and_the_same_command_begins_again(source, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "0.png")
    for n in range(1, 100):
        os.link(source / "0.png", source / f"{n}.png")
    out = tmp_path / "out"
    command = [*(sys.executable, "-m", "data.folder", "--images", str(source), "--captions", "none"), "--out"]
    more = ["--shard-size", "10", "--workers", "2", "--resize", "200"]
    process = subprocess.Popen([*command, str(out), *more], stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((out / "shards.json").read_text())["shards"] is None
    deadline = time.monotonic() + 60
    while processes_of(process.pid):  # they notice that their parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for again in (out, tmp_path / "whole"):
        assert folder.main([*command[3:], str(again), *more]) == 0
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
