"""data.folder on folders as people have them: accepted and skipped files, and messages."""

import contextlib
import io
import json
import unicodedata

import pytest
import webdataset
from PIL import ExifTags, Image
from tiny_shards import png

from data import folder


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def put(source, *names):
    for n, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(png(n, 12))


def packed(source, out, captions="txt", **more):
    """Pack all for training; return the samples by file, and how many were skipped for which reason."""
    _, skipped = folder.pack_folder(source, out, str(captions), val_fraction=0, **more)
    samples = webdataset.WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False)
    found = {json.loads(sample["json"])["file"]: sample for sample in samples}
    return found, {reason: len(names) for reason, names in skipped.files.items()}


def captions_of(found):
    return {name: sample["txt"].decode() for name, sample in found.items()}


def error_of(source, out, *more):
    with contextlib.redirect_stderr(io.StringIO()) as output:
        assert folder.main(["--images", str(source), "--out", str(out), *more]) == 2
    message = output.getvalue()
    assert message.startswith("error: ") and len(message) <= 300 and message.count("\n") == 1
    return message


def test_a_folder_per_class_gives_captions_and_labels(source, out):
    put(source, "black_cat/a.png", "black_cat/old/b.png", "dog/a.png", "stray.png")
    found, skipped = packed(source, out, "folders")
    assert {name: (s["txt"], s["cls"]) for name, s in found.items()} == {
        "black_cat/a.png": (b"black cat", b"0"),
        "black_cat/old/b.png": (b"black cat", b"0"),
        "dog/a.png": (b"dog", b"1"),
    }
    assert skipped == {"in no folder of a class": 1}
    assert (out / "classes.txt").read_text() == "black_cat\ndog\n"


def test_missing_files_are_reported_with_the_option_that_helps(source, out):
    put(source, "cat/a.png", "dog/b.png")
    message = error_of(source, out)
    assert "2 without a .txt file" in message and "--captions folders" in message
    (source / "captions.jsonl").write_text("{}")
    message = error_of(source, out)  # may cut a long path at its middle
    assert "--captions /" in message and message.rstrip().endswith("/images/captions.jsonl")
    assert "no jpg, jpeg, png or webp" in error_of(out.parent, out / "new", "--images", str(make(out)))


def make(path):
    path.mkdir()
    return path


TABLES = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "x; y"}\n{"file_name": "b.png", "text": "z"}\n',
    "metadata.csv": "file_name,text\na.png,x; y\nb.png,z\n",
    "excel.csv": '\ufefffile;caption\r\na.png;"x; y"\r\nb.png;z\r\n',
    "table.tsv": "path\tprompt\na.png\tx; y\nb.png\tz\n",
    "pairs.csv": "image,text\na.png,x; y\nb.png,z\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_others_write_them(source, out, name):
    put(source, "a.png", "b.png")
    (source / name).write_text(TABLES[name], encoding="utf-8", newline="")
    found, skipped = packed(source, out, source / name)
    assert captions_of(found) == {"a.png": "x; y", "b.png": "z"} and not skipped


def test_columns_have_the_names_that_are_given(source, out):
    put(source, "a.png")
    table = source / "t.csv"
    table.write_text("id|Bild|Text|Art\n1|a.png|x|7\n")
    message = error_of(source, out, "--captions", str(table))
    assert (
        "t.csv, line 2: has the columns id|Bild|Text|Art, expected file and caption: see --columns" in message
    )
    found, _ = packed(source, out, table, columns=["Bild", "Text", "Art"])
    assert captions_of(found) == {"a.png": "x"} and found["a.png"]["cls"] == b"7"
    assert "--columns: got Bild, expected FILE CAPTION" in error_of(source, out, "--columns", "Bild")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_in_another_encoding_is_named(source, out, encoding):
    put(source, "a.png")
    (source / "t.csv").write_text("file,caption\na.png,Löwe\n", encoding=encoding)
    message = error_of(source, out, "--captions", str(source / "t.csv"))
    assert "t.csv: is not UTF-8" in message and "save it as UTF-8" in message


def test_suffixes_count_in_any_case(source, out):
    put(source, "P1.PNG", "p2.png")
    (source / "P1.TXT").write_text("one")
    (source / "p2.Txt").write_text("two")
    assert captions_of(packed(source, out)[0]) == {"P1.PNG": "one", "p2.png": "two"}


def test_accents_may_be_written_in_two_ways(source, out):
    """macOS decomposes names, a table of elsewhere does not."""
    composed, apart = (unicodedata.normalize(form, "Löwe.v1.png") for form in ("NFC", "NFD"))
    put(source, apart)
    (source / composed).with_suffix(".txt").write_text("lion")
    assert captions_of(packed(source, out)[0]) == {apart: "lion"}
    table = source / "t.csv"
    table.write_text(f"file,caption\n{composed},a lion\n", encoding="utf-8")
    found, skipped = packed(source, out.with_name("table"), table)
    assert captions_of(found) == {apart: "a lion"} and not skipped
    assert "." not in found[apart]["__key__"]


def test_other_formats_are_counted_each(source, out):
    put(source, "a.png", "b.gif", "c.GIF", "d.heic", "e.bmp", "._a.png", ".thumbnails/a.png")
    skipped = packed(source, out, "none")[1]
    assert skipped == {
        f"of another format, {kind}": count for kind, count in (("gif", 2), ("heic", 1), ("bmp", 1))
    }


def test_links_are_followed_and_circles_left(source, out):
    elsewhere = make(source.parent / "elsewhere")
    put(elsewhere, "a.png")
    (source / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    (source / "gone.png").symlink_to(source / "nothing.png")
    found, skipped = packed(source, out, "none")
    assert set(found) == {"linked/a.png"}
    assert skipped == {"a link that leads nowhere": 1, "a folder that was entered by another name": 1}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about each
def test_malformed_exif_costs_one_image_at_most(source, out):
    """Pillow raises errors of several kinds at these bytes: struct.error, TypeError."""
    put(source, "good.png")
    image, exif = Image.new("RGB", (8, 8)), Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, (72, 1)
    exif[ExifTags.Base.ImageDescription], exif[ExifTags.Base.UserComment] = "words", "x" * 8
    block = exif.tobytes()
    damages = [(17, 0), (17, 1), (41, 0), (41, 1), (43, 1)]
    for position, byte in damages:
        damaged = block[:position] + bytes([byte]) + block[position + 1 :]
        image.save(source / f"{position}-{byte}.jpg", exif=damaged)
    found, skipped = packed(source, out, "none")
    assert len(found) + skipped.get("cannot be decoded", 0) == 1 + len(damages)
    assert "good.png" in found


def test_another_source_is_named_in_words(source, out):
    put(source, "a.png", "b.png")
    folder.pack_folder(source, out, "none")
    put(source, "c.png")
    arguments = ["--captions", "none"]
    assert "packed with 2 images of images, captions none instead of 3 images of" in error_of(
        source, out, *arguments
    )
    (source / "c.png").unlink()
    put(source, "b.png")
    assert "2 images of images, captions none, which have changed since" in error_of(source, out, *arguments)


def test_files_named_relative_to_the_current_folder_are_named_as_they_should_be(source, out):
    put(source, "old/a.png")
    (source / "t.csv").write_text("file,caption\ngone.png,x\nimages/old/a.png,y\n")
    message = error_of(source, out, "--captions", str(source / "t.csv"))
    assert message.endswith("Name files relative to --images: old/a.png, not images/old/a.png\n")
    (source / "t.csv").write_text("file,caption\ngone.png,x\n")
    message = error_of(source, out, "--captions", str(source / "t.csv"))
    assert message.endswith("skipped 1 missing, 1 not named in the table\n")


def test_too_few_images_say_what_was_skipped(source, out):
    put(source, "a.png", "b.png", "c.png")
    (source / "a.txt").write_text("x")
    said = "1 usable images are too few for --val-fraction 0.05"
    assert error_of(source, out).endswith(f"{said}, skipped 2 without a .txt file\n")
    for name in ("b.png", "c.png"):
        (source / name).unlink()
    assert error_of(source, out).endswith(f"{said}\n")


def test_it_ends_with_what_was_packed_and_the_next_command(source, out, capsys, monkeypatch):
    put(source, *(f"{n}.png" for n in range(10)), "bare.png")
    for n in range(10):
        (source / f"{n}.txt").write_text(f"number {n // 2}")
    monkeypatch.chdir(out.parent)
    for _ in range(2):
        folder.main(["--images", "images", "--out", "shards/own", "--val-fraction", "0.2"])
        output = capsys.readouterr().out
        assert "shards/own: 8 train and 2 val images in 2 shards, 0.0 MB\n" in output
        assert "  shorter sides: 12 to 12 pixels, median 12\n" in output
        assert "  captions: 10, 5 of them distinct, of 2 words, such as number" in output
        assert "  skipped 1, all listed in shards/own/skipped.txt:\n    1 without a .txt file" in output
        assert "\nnext: python -m ldm.fit --config own/64/autoencoder\n" in output
    folder.main(["--images", "images", "--out", "mine"])
    assert '--data.train "mine/train-*.tar" --data.val "mine/val-*.tar"' in capsys.readouterr().out
