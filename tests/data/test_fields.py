"""The table of fields: a row is all that a further field of the data needs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import ROOT
from tiny_shards import png, sample, write_tar
from torch import Tensor

from ldm import sample as command
from ldm.data import decode, raster
from ldm.data.buckets import Size
from ldm.data.fields import FIELDS, Field, collate, converted, whitelist
from ldm.data.index import load_index, sidecar, summarize
from ldm.data.module import Indexed, Shards, Streaming
from ldm.sampling import draw
from ldm.sampling.requests import as_batch, expand_requests


def on_device(depth: Tensor) -> Tensor:
    return depth.float() / 255


@pytest.fixture
def depth(monkeypatch):
    """A field that ldm knows nothing of."""
    pixels = decode.pixels(raster.classes)
    row = Field(("depth.png",), pixels, on_device=on_device, option="--depth", help="Image of depths.")
    monkeypatch.setitem(FIELDS, "depth", row)


def grey(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def shard(tmp_path) -> str:
    files = []
    for number in range(4):
        files += [*sample(number), (f"{number:06d}.depth.png", grey(50 * number))]
    return str(write_tar(tmp_path / "t.tar", files))


@pytest.mark.parametrize("reader", [Indexed(), Streaming(shuffle_buffer=1)])
def test_a_new_row_gets_its_field_from_shards_into_a_batch(depth, shard, reader):
    data = Shards(shard, shard, image_size=8, batch_size=4, fields=["image", "depth"], reader=reader)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert batch["depth"].shape == (4, 1, 8, 8) and batch["depth"].dtype == torch.float32
        found = dict(zip(batch["key"], batch["depth"][:, 0, 0, 0].tolist(), strict=True))
        assert found == pytest.approx({f"{n:06d}": 50 * n / 255 for n in range(4)})


def test_a_new_row_gets_its_field_from_an_option_of_sample(depth, shard, tmp_path):
    (tmp_path / "near.png").write_bytes(grey(200))
    options = command.parser().parse_args(["--checkpoint=x", f"--depth={tmp_path / 'near.png'}"])
    batch = as_batch(expand_requests(command.sample_options(options), ["depth"], Size(8, 8)))
    assert torch.equal(
        draw.on_device(batch, torch.device("cpu"))["depth"], torch.full((1, 1, 8, 8), 200 / 255)
    )
    options = command.parser().parse_args(["--checkpoint=x", f"--shards={shard}"])
    requests = expand_requests(command.sample_options(options), ["depth"], Size(8, 8))
    assert [int(request.fields["depth"].max()) for request in requests] == [0, 50, 100, 150]
    with pytest.raises(ValueError, match="got nothing, expected --depth"):
        nothing = command.parser().parse_args(["--checkpoint=x"])
        expand_requests(command.sample_options(nothing), ["depth"], Size(8, 8))


def test_an_index_made_with_another_table_is_made_anew(shard, monkeypatch):
    before = summarize(shard, None)
    time = sidecar(shard, None).stat().st_mtime_ns
    assert summarize(shard, None) == before and sidecar(shard, None).stat().st_mtime_ns == time
    monkeypatch.setitem(FIELDS, "depth", Field(("depth.png",), decode.pixels(raster.classes)))
    assert summarize(shard, None).present == {**before.present, "depth.png": 4}
    assert load_index(shard, None).members == whitelist()
    assert [name for name, _, _ in load_index(shard, None).spans(0, whitelist())] == [
        "png",
        "txt",
        "json",
        "depth.png",
    ]


def test_without_its_row_a_member_is_never_read(shard):
    assert "depth.png" not in summarize(shard, None).present
    with pytest.raises(ValueError, match=r"data\.fields: got \['depth'\], expected some of image, text"):
        Shards(shard, shard, image_size=8, batch_size=4, fields=["depth"])


def test_the_whitelist_keeps_its_order():
    """The order of members in shards that ldm.encode writes, and of columns in indices."""
    images = ("jpg", "jpeg", "png", "webp")
    assert whitelist() == (
        *images,
        "txt",
        "json",
        "cls",
        "latent.npy",
        "latent.flip.npy",
        "text.npy",
        "mask.png",
        "low.png",
        "low.jpg",
        "map.png",
    )


def test_each_field_is_documented():
    text = (ROOT / "data" / "README.md").read_text()
    for name, field in FIELDS.items():
        assert f"| `{name}` |" in text
        assert all(f"`{member}`" in text for member in field.members)


def test_samples_of_different_shapes_are_named():
    samples = [{"key": str(n), "low_res": torch.zeros(3, 4 + n, 4)} for n in range(2)]
    with pytest.raises(ValueError, match=r"samples '0' and '1' have low_ress of shapes \(3, 4, 4\) and"):
        collate(samples)


def test_only_bytes_are_converted():
    label_map = torch.ones(1, 2, 2, dtype=torch.uint8)
    found = converted({"key": ["a"], "label_map": label_map, "image": torch.zeros(1, 3, 2, 2)})
    assert found["label_map"].dtype == torch.int64 and found["image"].unique().tolist() == [0]


def test_json_gives_a_field_where_all_samples_have_it(tmp_path):
    meta = json.dumps({"layout": [], "caption": "x"}).encode()
    path = str(write_tar(tmp_path / "v.tar", [("0.png", png(0)), ("0.json", meta)]))
    assert Indexed().evaluation(path, 8).fields == ("image", "text", "layout")
