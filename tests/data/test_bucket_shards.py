"""Shards of images of many shapes, read in batches of one shape."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tiny_shards import write_tar

from ldm.data.buckets import Buckets
from ldm.data.module import Shards, Streaming
from ldm.data.order import mix
from ldm.data.sets import TrainSet
from ldm.data.source import DataRank

SHAPES = [(24, 24), (16, 32), (40, 20), (30, 31), (64, 24), (17, 48)]
ALONE = DataRank(0, 1)


def shaped(number: int) -> tuple[int, int]:
    return SHAPES[mix(number, 7) % len(SHAPES)]


def png(number: int, height: int, width: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), number % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """120 samples in three shards, their numbers as grey levels."""
    folder = tmp_path_factory.mktemp("shapes")
    for shard in range(3):
        files = []
        for number in range(40 * shard, 40 * shard + 40):
            height, width = shaped(number)
            files += [(f"{number:06d}.png", png(number, height, width)), (f"{number:06d}.txt", b"grey")]
        write_tar(folder / f"train-{shard:06d}.tar", files)
    return str(folder / "train-{000000..000002}.tar")


def data(shards, batch_size=4, workers=0, **more):
    more = {"buckets": Buckets(pixels=576, multiple=8), "image_size": 24, "fields": ["image"]} | more
    val = next(iter(shards.values())).shards if isinstance(shards, dict) else shards
    return Shards(shards, val, batch_size=batch_size, num_workers=workers, **more)


def batches(shards, count, start=0, rank=ALONE, **more):
    """The keys and the shape of some batches, from a position on."""
    found = data(shards, **more)
    found._global_batch = found.batch_size * rank.world_size
    loader = iter(found.source.loader(lambda: start, found.batch_size, found.num_workers, rank))
    return [(batch["key"], tuple(batch["image"].shape[2:])) for batch in (next(loader) for _ in range(count))]


def test_batches_have_the_nearest_of_the_sizes(shards):
    sizes = Buckets(pixels=576, multiple=8).sizes(24)
    assert [str(size) for size in sizes] == ["32x16", "24x24", "16x32"]
    expected = {(24, 24): (24, 24), (30, 31): (24, 24), (16, 32): (16, 32), (17, 48): (16, 32)}
    expected |= {(40, 20): (32, 16), (64, 24): (32, 16)}
    found = batches(shards, 30)
    for keys, shape in found:
        assert {expected[shaped(int(key))] for key in keys} == {shape}
    counts = Counter(key for keys, _ in found for key in keys)
    assert len({shape for _, shape in found}) == 3
    # a sample that the first epoch leaves over comes in the next one
    assert counts.total() == 120
    assert sorted(set(counts.values())) in ([1], [1, 2])
    assert len(counts) >= 120 - 3 * 3


def test_pixels_are_the_image_s_and_nothing_is_stretched(shards):
    loader = data(shards).source.loader(lambda: 0, 4, 0, ALONE)
    batch = next(iter(loader))
    grey = batch["image"].flatten(1).unique(dim=1).tolist()
    assert grey == [[int(key)] for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_the_same_at_any_rank_worker_and_start(shards, workers):
    alone = batches(shards, 20)
    two = [
        batches(shards, 12, start=32, rank=DataRank(rank, 2), batch_size=2, workers=workers)
        for rank in range(2)
    ]
    for number in range(12):
        (first, shape), (second, same_shape) = two[0][number], two[1][number]
        interleaved = [key for pair in zip(first, second, strict=True) for key in pair]
        assert shape == same_shape
        if number + 8 < 20:
            assert (interleaved, shape) == alone[8 + number]


def test_sizes_with_few_samples_are_left_to_others_and_named(shards):
    plenty = data(shards, batch_size=60)
    report = "\n".join(plenty.source.report())
    assert plenty.source.sets[""].samples.sizes == ((24, 24),)
    assert "data.buckets: 120 in 24x24" in report
    assert "sizes with fewer samples than a global batch of 60: 32x16 (" in report
    assert {shape for _, shape in batches(shards, 4, batch_size=60)} == {(24, 24)}
    few = "\n".join(data(shards, batch_size=2).source.report())
    assert "fewer" not in few
    assert " in 32x16, " in few


def test_a_filter_leaves_samples_out_of_their_buckets(shards):
    kept = data(shards, filter="width < 30")
    numbers = [number for number in range(120) if shaped(number)[1] < 30]
    assert kept.num_train == len(numbers)
    assert kept.source.identity()["filter"] == "width < 30"
    found = batches(shards, 2 * len(numbers) // 4, filter="width < 30")
    assert {int(key) for keys, _ in found for key in keys} == set(numbers)


def test_validation_keeps_its_square(shards):
    batch = next(iter(data(shards).val_dataloader()))
    assert batch["image"].shape == (4, 3, 24, 24)


def test_a_bad_sample_is_replaced_by_one_of_its_shape(shards, tmp_path):
    files = []
    for number in range(40):
        height, width = SHAPES[number % 3]
        content = png(number, height, width)
        content = content[: len(content) // 2] if number % 5 == 0 else content
        size = json.dumps({"height": height, "width": width}).encode()
        files += [(f"{number:06d}.png", content), (f"{number:06d}.json", size)]
    pattern = str(write_tar(tmp_path / "train-000000.tar", files))
    loader = iter(data(pattern).source.loader(lambda: 0, 4, 0, ALONE))
    seen = [next(loader) for _ in range(12)]
    assert all(int(key) % 5 for batch in seen for key in batch["key"])
    assert sum(len(batch.get("skipped", ())) for batch in seen) > 3


def test_what_does_not_go_with_buckets_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"data\.buckets: Streaming does not know the sizes"):
        _ = data(shards, reader=Streaming()).source
    with pytest.raises(ValueError, match=r"data\.buckets: low-resolution images keep their own size"):
        _ = data(shards, fields=["image", "low_res"]).source
    broken = [(f"{n}.{end}", b"no image") for n in range(4) for end in ("png", "txt")]
    pattern = str(write_tar(tmp_path / "train-000000.tar", broken))
    with pytest.raises(ValueError, match=r"data\.buckets: none of 4 samples has a height and width"):
        _ = data(pattern).source


def test_another_global_batch_or_table_is_another_order(shards):
    then = data(shards).state_dict()
    for now, message in [
        (data(shards, batch_size=8), r"data\.batch_size x processes 4, found 8"),
        (data(shards, buckets=None), "buckets '32x16 24x24 16x32', found None"),
        (data(shards, buckets=Buckets(pixels=576, multiple=4)), "buckets '32x16 24x24 16x32', found '"),
    ]:
        with pytest.raises(ValueError, match=message):
            now.load_state_dict(then)
    plain = data(shards, buckets=None).state_dict()
    with pytest.raises(ValueError, match="buckets None, found '32x16 24x24 16x32'"):
        data(shards).load_state_dict(plain)
    data(shards, buckets=None, batch_size=8).load_state_dict(plain)
    data(shards).load_state_dict(then)


def test_sets_take_turns_by_global_batches(shards):
    """Two sets of weights 2 and 1: each batch is of one set and one shape, and so at any number of ranks."""
    one, others = shards.replace("{000000..000002}", "000000"), shards.replace("000000..", "000001..")
    sets = {"one": TrainSet(one, weight=1), "others": TrainSet(others, weight=2)}
    found = data(sets)
    loader = iter(found.source.loader(lambda: 0, 4, 0, ALONE))
    alone = [next(loader) for _ in range(60)]
    names = [{key.split("/")[0] for key in batch["key"]} for batch in alone]
    assert all(len(of_batch) == 1 for of_batch in names)
    counts = found.source.counts(240)
    assert counts == {name: 4 * names.count({name}) for name in ("one", "others")}
    assert abs(counts["one"] - 80) < 4
    two = data(sets, batch_size=2)
    two._global_batch = 4
    loaders = [iter(two.source.loader(lambda: 80, 2, 0, DataRank(rank, 2))) for rank in range(2)]
    for batch in alone[20:40]:
        halves = [next(loader)["key"] for loader in loaders]
        assert [key for pair in zip(*halves, strict=True) for key in pair] == batch["key"]
