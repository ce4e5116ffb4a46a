"""Fields and image size that a configuration leaves open come from what is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import png, sample, write_tar
from torch import nn

from ldm.data.module import Shards


class Reads(nn.Module):
    """A module that states its fields: latents instead of images where there are some."""

    def __init__(self, *fields: str, image_size: int | None = None) -> None:
        super().__init__()
        self.fields, self.image_size = fields, image_size

    def reads(self, stored):
        return tuple("latent" if field == "image" and "latent" in stored else field for field in self.fields)


def latent() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((8, 2, 2), np.float16))
    return out.getvalue()


@pytest.fixture
def images(shards) -> str:
    return shards([4])


@pytest.fixture
def latents(tmp_path) -> str:
    files = [file for n in range(4) for file in [*sample(n), (f"{n:06d}.latent.npy", latent())]]
    path = write_tar(tmp_path / "latents" / "train-000000.tar", files)
    manifest = {"autoencoder": {"checkpoint": "x", "sha256": "0"}, "image_size": 24, "shards": {}}
    (path.parent / "latents.json").write_text(json.dumps(manifest))
    return str(path)


def derived(train: str, val: str, module: object, **stated) -> tuple[tuple[str, ...], int]:
    data = Shards(train, val, batch_size=2, **stated)
    data.derive(module)
    assert set(next(iter(data.train_dataloader()))) == {"key", *data.fields}
    return data.fields, data.image_size


def test_fields_are_what_the_module_reads(images):
    assert derived(images, images, Reads("label", "image"), image_size=8) == (("image", "label"), 8)
    assert derived(images, images, Reads("text", image_size=16)) == (("text",), 16)
    assert derived(images, images, nn.Identity(), image_size=8)[0] == ("image", "text")


def test_latents_are_read_where_a_manifest_lists_them(images, latents):
    assert derived(latents, images, Reads("image", "text", image_size=16)) == (("text", "latent"), 24)
    assert derived(images, images, Reads("image", image_size=16)) == (("image",), 16)
    assert derived([images, latents], images, Reads("image", image_size=16)) == (("image",), 16)


def test_stated_fields_and_size_are_kept(images, latents):
    stated = {"fields": ["image"], "image_size": 8}
    assert derived(latents, images, Reads("image", "text"), **stated) == (("image",), 8)
    assert derived(latents, images, Reads("image"), image_size=8) == (("latent",), 8)


def test_the_next_stage_derives_its_own(images):
    data = Shards(images, images, batch_size=2)
    data.derive(Reads("image", "text", image_size=8))
    first = data.source
    data.derive(Reads("image", "text", image_size=8))
    assert data.source is first
    data.derive(Reads("label", "image", image_size=16))
    assert set(data.source[0]) == {"key", "image", "label"} and data.evaluation[0]["image"].shape[-1] == 16


def test_an_underivable_size_is_requested_by_its_key(images):
    data = Shards(images, images, batch_size=2)
    data.derive(Reads("image"))
    with pytest.raises(ValueError, match=r"data\.image_size: got none, expected the side of the images"):
        _ = data.source
    with pytest.raises(ValueError, match=r"data\.image_size: got none"):
        data.setup("fit")


def test_a_field_without_a_row_is_named_with_the_module(images):
    with pytest.raises(ValueError, match=r"the fields that Reads reads: got \['depth'\], expected some of"):
        derived(images, images, Reads("depth"), image_size=8)


def test_fields_that_shards_lack_are_named(tmp_path):
    bare = str(write_tar(tmp_path / "t.tar", [("0.png", png(0))]))
    with pytest.raises(ValueError, match=r"data\.fields: asks for \['label'\]"):
        derived(bare, bare, Reads("image", "label"), image_size=8)


def test_a_damaged_manifest_is_named(latents, images):
    Path(latents).with_name("latents.json").write_text('{"shards": {}}')
    with pytest.raises(ValueError, match=r"latents\.json: is no manifest \(it has no autoencoder and"):
        derived(latents, images, Reads("image"))
