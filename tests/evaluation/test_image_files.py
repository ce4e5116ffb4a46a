"""A folder that is measured holds the images of one model, and nothing that is drawn twice."""

import numpy as np
import pytest
import torch

from ldm.evaluation.files import ImageArray, ImageFolder
from ldm.io.images import LEVELS, write_png
from ldm.types import ImageKind


def drawn(folder, name, size=8, **text):
    write_png(folder / name, torch.zeros(3, size, size), {"software": "ldm 0.2.0", **text})


def test_the_grid_in_a_folder_of_drawn_images_is_skipped(tmp_path):
    drawn(tmp_path, "000000.png", key="a", checkpoint_sha256="1" * 64)
    drawn(tmp_path, "grid.png", checkpoint_sha256="1" * 64)  # of one image it has the size of it
    assert [path.name for path in ImageFolder(str(tmp_path), "--images").paths] == ["000000.png"]


def test_a_grid_of_another_program_is_an_image(tmp_path):
    write_png(tmp_path / "grid.png", torch.zeros(3, 8, 8), {})
    assert len(ImageFolder(str(tmp_path), "--images")) == 1


def test_images_of_two_models_are_refused(tmp_path):
    for i, sha256 in enumerate("112"):
        drawn(tmp_path, f"{i:06d}.png", checkpoint_sha256=sha256 * 64)
    write_png(tmp_path / "photo.png", torch.zeros(3, 8, 8), {})
    with pytest.raises(ValueError, match="mixes images of 2 checkpoints") as caught:
        ImageFolder(str(tmp_path), "--images")
    message = str(caught.value)
    assert "'000000.png' of 111111111111 and '000002.png' of 222222222222" in message
    assert len(message.replace(str(tmp_path), "samples")) <= 300
    (tmp_path / "000002.png").unlink()
    assert len(ImageFolder(str(tmp_path), "--images")) == 3


@pytest.mark.parametrize("hidden", ["._000000.png", ".ipynb_checkpoints/a.png", "__MACOSX/._a.png"])
def test_copies_and_notes_that_programs_hide_beside_images_are_none(tmp_path, hidden):
    drawn(tmp_path, "000000.PNG")
    drawn(tmp_path, "a/000001.png")
    drawn(tmp_path, hidden)
    names = [path.name for path in ImageFolder(str(tmp_path), "--images").paths]
    assert names == ["000000.PNG", "000001.png"]


@pytest.mark.parametrize("kind", [ImageKind(1, 16), ImageKind(4, 8)], ids=str)
def test_images_of_a_kind_are_read_as_they_were_drawn_from_folders_and_arrays(tmp_path, kind):
    levels = torch.randint(0, 2**kind.bits, (2, kind.channels, 8, 8)).to(LEVELS[kind.bits])
    for i, image in enumerate(levels):
        write_png(tmp_path / "images" / f"{i}.png", image, {})
    folder = ImageFolder(str(tmp_path / "images"), "--images", kind)
    assert torch.equal(torch.stack([folder[0]["image"], folder[1]["image"]]), levels)
    np.savez(tmp_path / "a.npz", arr_0=levels.permute(0, 2, 3, 1).numpy())
    assert torch.equal(ImageArray(str(tmp_path / "a.npz"), "--images", kind)[1]["image"], levels[1])
    with pytest.raises(ValueError, match=rf"--images: arr_0 of '.*' is uint{kind.bits} .*, expected uint8"):
        ImageArray(str(tmp_path / "a.npz"), "--images")
