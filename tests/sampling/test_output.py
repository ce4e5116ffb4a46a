"""Images of two calls are never mixed in a folder."""

import os

import pytest
import torch

from ldm.io.images import write_png
from ldm.sampling.output import image_path, output_folder

IMAGE = torch.zeros(3, 2, 2, dtype=torch.uint8)


def metadata(num, checkpoint="sha", **more):
    return [{"prompt": "a", "key": f"a/{i}", "checkpoint_sha256": checkpoint, **more} for i in range(num)]


def call(out, texts):
    """Draw, as far as files go."""
    folder = output_folder(out, texts)
    for i, text in enumerate(texts):
        write_png(image_path(folder, i), IMAGE, text)
    write_png(folder / "grid.png", IMAGE, {})
    return folder


def test_the_same_call_and_a_longer_one_may_be_repeated(tmp_path):
    out = str(tmp_path / "s")
    call(out, metadata(3))
    call(out, metadata(3, checkpoint="sha", software="ldm 9"))
    call(out, metadata(5))
    assert len(os.listdir(out)) == 6


@pytest.mark.parametrize(
    ("texts", "which"),
    [
        (metadata(2), "000002.png"),
        (metadata(3, checkpoint="other"), "000000.png"),
        (metadata(9, seed="1"), "000000.png"),
    ],
    ids=["a shorter call", "another model", "another seed"],
)
def test_another_call_is_refused_and_changes_nothing(tmp_path, texts, which):
    out = tmp_path / "s"
    call(str(out), metadata(3))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=rf"--out: '.*{which}' is an image of another call"):
        call(str(out), texts)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("name", ["photo.JPG", "000000.png"])
def test_images_of_other_programs_are_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"no image that Pillow knows")
    (tmp_path / "notes.txt").write_text("harmless")
    with pytest.raises(ValueError, match=f"{name}' is an image of another call"):
        output_folder(str(tmp_path), metadata(1))


def test_without_a_folder_each_other_call_gets_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [metadata(3), metadata(2), metadata(3, "other"), metadata(3)]
    assert [str(call(None, texts)) for texts in calls] == ["samples", "samples-2", "samples-3", "samples"]
