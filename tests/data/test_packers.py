"""The packers' shards, read back by the data module."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from comparing import error_of
from PIL import Image
from tiny_shards import png

from data import digits, folder
from data.writing import JOURNAL, MANIFEST, Samples, pack, write_shards
from ldm.data.index import scan, summarize
from ldm.data.module import Shards


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members(path: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False))


def test_shards_hold_the_samples_in_order_and_are_reproducible(tmp_path):
    samples = [{"__key__": f"{n:03d}", "txt": f"é {n}", "png": png(n)} for n in range(7)]
    shards = write_shards(iter(samples), tmp_path / "a", "train", 3)
    assert [path.name for path in shards] == [f"train-00000{n}.tar" for n in range(3)]
    assert [len(scan(str(path))) for path in shards] == [3, 3, 1]
    assert members(shards[2])[0]["txt"] == "é 6".encode()
    write_shards(samples, tmp_path / "b", "train", 3)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_an_interrupted_pack_leaves_no_partial_shard_and_goes_on(tmp_path, capsys):
    samples = [{"__key__": f"{n}", "txt": f"x{n}"} for n in range(7)]

    def broken():
        yield from samples[:5]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        pack(tmp_path, {"a": 1}, {"train": Samples(broken())}, 2, 7)
    done = ["train-000000.tar", "train-000001.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [JOURNAL, MANIFEST, *done]
    before = [(tmp_path / name).stat().st_ino for name in done]
    (tmp_path / "train-000002.tar").write_bytes(b"renamed, but not in the journal")
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('["train-000002.tar", {"split": "tr')  # torn
    assert pack(tmp_path, {"a": 1}, {"train": Samples(samples)}, 2, 7)
    assert "going on after 2 finished shards" in capsys.readouterr().err
    assert [(tmp_path / name).stat().st_ino for name in done] == before
    pack(tmp_path / "whole", {"a": 1}, {"train": Samples(samples)}, 2, 7)
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "whole") and len(bytes_of(tmp_path)) == 4
    assert (tmp_path / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()
    assert not (tmp_path / JOURNAL).exists()
    assert not pack(tmp_path, {"a": 1}, {"train": Samples(samples)}, 2, 7)
    with pytest.raises(ValueError, match=r"shards.json: the folder was packed with a=1 instead of 2"):
        pack(tmp_path, {"a": 2}, {"train": Samples(samples)}, 2, 7)


def test_an_interrupted_pack_with_other_settings_begins_anew(tmp_path, capsys):
    samples = [{"__key__": f"{n}", "txt": "x"} for n in range(4)]
    with pytest.raises(ValueError, match="the split 'val' has no samples"):
        pack(tmp_path, {"a": 1}, {"train": Samples(samples), "val": Samples([])}, 1, 4)
    assert pack(tmp_path, {"a": 2}, {"train": Samples(samples)}, 2, 4)
    assert "was begun with a=1 instead of 2: packing anew" in capsys.readouterr().err
    assert sorted(bytes_of(tmp_path)) == ["train-000000.tar", "train-000001.tar"]


def test_tar_files_of_others_are_never_touched(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train-000000.tar: not a shard of this set"):
        pack(tmp_path, {}, {"train": Samples([{"__key__": "0", "txt": "x"}])}, 2, 1)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


def test_digits_are_the_real_ones_stratified_and_captioned(tmp_path, capsys):
    digits.main(["--out", str(tmp_path)])
    before = bytes_of(tmp_path)
    digits.main(["--out", str(tmp_path)])
    assert "already packed" in capsys.readouterr().out
    assert bytes_of(tmp_path) == before
    module = Shards(
        str(tmp_path / "train-*.tar"),
        str(tmp_path / "val-*.tar"),
        image_size=8,
        batch_size=10,
        fields=["image", "label"],
    )
    assert (module.num_train, module.num_val) == (1500, 297)
    images, labels = digits.load()
    counts = Counter(labels.tolist())
    for position in range(0, 297, 10):
        sample = module.evaluation[position]
        row = int(sample["key"].removeprefix("digits-"))
        assert np.array_equal(sample["image"].numpy(), np.stack([images[row]] * 3))
        assert sample["label"] == labels[row]
        assert sample["text"] == f"a handwritten digit {digits.WORDS[labels[row]]}"
    found = Counter(module.evaluation[position]["label"] for position in range(297))
    assert all(abs(found[d] - 297 * counts[d] / 1797) <= 1 for d in range(10))


def test_digits_are_enlarged_by_repeating_pixels(tmp_path):
    assert digits.pack_digits(tmp_path, size=16)
    images, _ = digits.load()
    sample = Shards(
        str(tmp_path / "train-*.tar"), str(tmp_path / "val-*.tar"), image_size=16, batch_size=1
    ).evaluation[0]
    row = int(sample["key"].removeprefix("digits-"))
    assert np.array_equal(sample["image"][0, ::2, 1::2].numpy(), images[row])
    with pytest.raises(ValueError, match="--size: 12, expected a multiple of 8"):
        digits.pack_digits(tmp_path, size=12)


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    (root / "sub.dir").mkdir(parents=True)
    for n in range(10):
        name = f"sub.dir/p.{n}" if n % 2 else f"p{n}"
        (root / f"{name}.png").write_bytes(png(n, 12))
        (root / f"{name}.txt").write_text(f" caption {n}\n")
    (root / "broken.jpg").write_bytes(b"no image")
    (root / "broken.txt").write_text("broken")
    (root / "silent.png").write_bytes(png(1))
    (root / "empty.png").write_bytes(png(1))
    (root / "empty.txt").write_text(" \n")
    (root / "old.bmp").write_bytes(b"BM")
    return root


def read_all(out: Path) -> dict[str, dict[str, bytes]]:
    samples = [sample for path in sorted(out.glob("*.tar")) for sample in members(path)]
    return {json.loads(sample["json"])["file"]: sample for sample in samples}


def test_a_folder_with_caption_files_keeps_the_bytes_and_reports_skipped_files(images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--images", str(images), "--out", str(out), "--val-fraction", "0.2", "--shard-size", "4"]
    folder.main(arguments)
    output = capsys.readouterr().out
    for reason in ("without a .txt file", "with an empty caption", "of another format", "cannot be decoded"):
        assert f"1 {reason}" in output
    assert "skipped 4" in output
    assert "broken.jpg" in (out / "skipped.txt").read_text()
    found = read_all(out)
    assert len(found) == 10
    assert found["sub.dir/p.3.png"]["png"] == (images / "sub.dir/p.3.png").read_bytes()
    assert found["sub.dir/p.3.png"]["txt"] == b"caption 3"
    assert summarize(str(out / "val-000000.tar"), None).count in (1, 2)
    before = bytes_of(out)
    folder.main(arguments)
    assert "already packed" in capsys.readouterr().out
    assert bytes_of(out) == before


def test_a_folder_counts_as_packed_once_its_report_is_written(images, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_write_about", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        folder.pack_folder(images, tmp_path / "out")
    monkeypatch.undo()
    assert folder.pack_folder(images, tmp_path / "out")[0]
    assert {"packed.txt", "skipped.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_with_a_table_of_captions_and_labels(images, tmp_path, kind):
    rows = [{"file": f"p{n}.png", "caption": f"table {n}, with a comma", "label": n} for n in (0, 2, 4)]
    rows += [{"file": "gone.png", "caption": "x", "label": 1}, {"file": "p6.png", "caption": "", "label": 1}]
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "caption", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, skipped = folder.pack_folder(images, tmp_path / "out", str(table), val_fraction=0)
    assert {reason: len(names) for reason, names in skipped.files.items()} == {
        "missing": 1,
        "with an empty caption": 1,
        "not named in the table": 9,
        "of another format, bmp": 1,
    }
    found = read_all(tmp_path / "out")
    assert {name: (s["txt"].decode(), s["cls"]) for name, s in found.items()} == {
        f"p{n}.png": (f"table {n}, with a comma", str(n).encode()) for n in (0, 2, 4)
    }


def test_resize_brings_the_shorter_side_down_and_leaves_small_images_alone(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGB", (60, 40), (200, 10, 10)).save(source / "large.jpg")
    Image.new("RGB", (16, 30)).save(source / "small.jpg")
    folder.pack_folder(source, tmp_path / "out", "none", val_fraction=0, resize=20)
    found = read_all(tmp_path / "out")
    assert found["small.jpg"]["jpg"] == (source / "small.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(found["large.jpg"]["jpg"])
    with Image.open(tmp_path / "x.jpg") as small:
        assert small.size == (30, 20)
    assert "txt" not in found["small.jpg"]


def test_bad_settings_end_in_one_line(images, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text("name,caption\np0.png,x\n")
    cases = {
        "not a folder": ["--images", str(tmp_path / "gone")],
        "line 2: has the columns name, caption, expected file and caption": ["--captions", str(table)],
        "is not a file": ["--captions", str(tmp_path / "gone.csv")],
        "--val-fraction: 1.5": ["--val-fraction", "1.5"],
        "--resize: 0": ["--resize", "0"],
    }
    for message, more in cases.items():
        options = ["--images", str(images), "--out", str(tmp_path / "out"), *more]
        assert re.search(message, error_of(capsys, options, folder.main))
    assert not (tmp_path / "out").exists()


def test_masks_and_low_resolution_copies_of_a_folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, size in [("wide", (40, 20)), ("tall", (21, 63)), ("even", (16, 16))]:
        pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.png")
    extras = folder.Extras(masks=True, low_res=4)
    assert folder.pack_folder(images, tmp_path / "a", "none", 0.0, extras=extras)[0]
    for sample in members(tmp_path / "a" / "train-000000.tar"):
        image, low, mask = (Image.open(io.BytesIO(sample[name])) for name in ("png", "low.png", "mask.png"))
        assert mask.size == image.size and min(low.size) == 4
        assert 0.1 <= (np.asarray(mask) > 127).mean() <= 0.5
    shards = str(tmp_path / "a" / "train-000000.tar")
    data = Shards(shards, shards, image_size=16, batch_size=3, fields=("image", "mask", "low_res"))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["low_res"].shape == (3, 3, 4, 4) and batch["mask"].shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"was packed with masks=True instead of None, low_res=4 instead"):
        folder.pack_folder(images, tmp_path / "a", "none", 0.0)


def test_a_folder_without_extras_is_as_it_was(tmp_path):
    """A set packed before there were any is still recognised."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(png(3))
    folder.pack_folder(images, tmp_path / "a", "none", 0.0)
    assert set(members(tmp_path / "a" / "train-000000.tar")[0]) >= {"png", "json"}
    manifest = tmp_path / "a" / MANIFEST
    record = json.loads(manifest.read_text())
    for name in ("masks", "low_res"):
        assert record["settings"].pop(name) is None
    manifest.write_text(json.dumps(record))
    assert not folder.pack_folder(images, tmp_path / "a", "none", 0.0)[0]
