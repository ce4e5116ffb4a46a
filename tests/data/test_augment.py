"""Augmentation: drawn by (seed, position) for training, never for validation."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import png, write_tar

from ldm.callbacks.caption_lengths import lengths
from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import decode_sample
from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.source import DataRank
from ldm.data.view import Augment, View

DRAWS = range(0, 2**63, 2**63 // 6000)
CAPTIONS = {"long": 3.0, "short": 1.0, "txt": 1.0}


def files(number: int) -> list[tuple[str, bytes]]:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    meta = {
        "caption": f"one {number}",
        "long": [f"long {number} {n}" for n in range(2)],
        "short": "x",
    }
    key = f"{number:06d}"
    return [(f"{key}.png", out.getvalue()), (f"{key}.json", json.dumps(meta).encode())]


@pytest.fixture
def shard(tmp_path):
    return str(write_tar(tmp_path / "a.tar", [file for number in range(24) for file in files(number)]))


def opened(shard, augment, reader=None, batch_size=4):
    reader = reader or Indexed()
    return Shards(shard, shard, image_size=8, batch_size=batch_size, reader=reader, augment=augment)


def samples(source, num, process=DataRank(0, 1), start=0, workers=0):  # noqa: B008
    batches = list(islice(source.loader(lambda: start, 4, workers, process), num))
    return [found for batch in batches for found in zip(*map(batch.get, FIELDS), strict=True)]


FIELDS = ("key", "text", "image")
AUGMENT = Augment(flip=0.5, crop="random", captions={"long": 0.7, "short": 0.3})


def test_without_augmentation_a_view_is_the_central_crop():
    assert Augment().view(8, 12, 5) == View(8, 12, draw=5)


def test_half_of_the_views_are_flipped_and_crops_lie_anywhere():
    views = [Augment(flip=0.5, crop="random").view(8, 8, draw) for draw in DRAWS]
    assert abs(sum(view.flip for view in views) / len(views) - 0.5) < 0.02
    down, across = np.array([view.crop for view in views]).T
    assert np.abs(np.histogram(down, 10, (0, 1))[0] / len(views) - 0.1).max() < 0.015
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.04
    assert abs(np.corrcoef(across, [view.flip for view in views])[0, 1]) < 0.04
    assert not any(Augment(flip=0.0).view(8, 8, draw).flip for draw in DRAWS)
    assert all(Augment(flip=1.0).view(8, 8, draw).flip for draw in DRAWS)


@pytest.mark.parametrize("lacking", [(), ("short",), ("long",), ("txt", "long")])
def test_captions_are_drawn_by_weight_among_those_that_a_sample_has(lacking):
    given = {"long": "long", "short": "short"}
    members = {"json": json.dumps({k: None if k in lacking else v for k, v in given.items()}).encode()}
    members |= {} if "txt" in lacking else {"txt": b"txt"}
    augment = Augment(captions=CAPTIONS)
    drawn = Counter(
        decode_sample(members, SampleId("a", "k"), ["text"], augment.view(8, 8, draw))["text"]
        for draw in DRAWS
    )
    total = sum(weight for key, weight in CAPTIONS.items() if key not in lacking)
    for key, weight in CAPTIONS.items():
        expected = 0.0 if key in lacking else weight / total
        assert abs(drawn[key] / len(DRAWS) - expected) < 0.02


def test_a_sample_without_the_drawn_keys_has_its_caption_and_odd_ones_are_bad():
    view = Augment(captions={"long": 1.0}).view(8, 8, 0)
    assert decode_sample({"txt": b"a"}, SampleId("a", "k"), ["text"], view)["text"] == "a"
    for odd in (7, [], [1], {"a": 1}):
        with pytest.raises(BadSample, match=r"'long' is .*, expected a list of strings"):
            decode_sample({"json": json.dumps({"long": odd}).encode()}, SampleId("a", "k"), ["text"], view)


def test_samples_with_drawn_captions_alone_need_no_other_and_one_without_any_is_a_bad_sample(tmp_path):
    """Nor must the first shard's first sample have one."""

    def shard(number, metas):
        rows = [(f"{number}{n}", meta) for n, meta in enumerate(metas)]
        bodies = [
            (f"{key}.{kind}", body)
            for key, meta in rows
            for kind, body in (("png", png(1)), ("json", json.dumps(meta).encode()))
        ]
        return str(write_tar(tmp_path / f"train-{number}.tar", bodies))

    paths = [shard(0, [{}, {"long": "l"}, {"short": "s"}]), shard(1, [{"short": "s"}] * 3)]
    for reader in (Indexed(), Streaming(shuffle_buffer=1)):
        data = Shards(
            paths, paths, image_size=8, batch_size=3, reader=reader, augment=AUGMENT, fields=["image", "text"]
        )
        batches = list(islice(data.train_dataloader(), 4))
        assert {text for batch in batches for text in batch["text"]} == {"l", "s"}
        skipped = {bad for batch in batches for bad in batch.get("skipped", ())}
        assert {bad.reason for bad in skipped} == {"missing text"} and "sample '00'" in skipped.pop().message
    with pytest.raises(
        ValueError, match=r"data.fields: asks for \['text'\], but the shard .*train-0.tar has 3"
    ):
        _ = opened(paths, Augment(captions={"other": 1.0})).source


@pytest.mark.parametrize("reader", [Indexed(), Streaming(shuffle_buffer=1)])
def test_stored_text_embeddings_are_of_no_captions_by_weight(shard, reader):
    fields = ["image", "text_embedding"]
    data = Shards(shard, shard, image_size=8, batch_size=4, reader=reader, augment=AUGMENT, fields=fields)
    with pytest.raises(
        ValueError, match=r"data.augment.captions: got {'long'.*embeddings .* of other captions"
    ):
        _ = data.source


def test_every_sample_is_drawn_by_its_position_whatever_ranks_workers_and_start(shard):
    source = opened(shard, AUGMENT).source
    whole = samples(source, 12)
    halves = samples(source, 6, DataRank(0, 2)), samples(source, 6, DataRank(1, 2), workers=1)
    split = [found for pair in zip(*halves, strict=True) for found in pair]
    late = samples(source, 6) + samples(source, 6, start=24)
    for other in (split, late):
        assert [found[:2] for found in other] == [found[:2] for found in whole]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(other, whole, strict=True))
    assert {text.split()[0] for _, text, _ in whole} == {"long", "x"}
    first, second = ({key: (text, image.tolist()) for key, text, image in whole[n : n + 24]} for n in (0, 24))
    assert len(first) == 24 and sum(first[key] != second[key] for key in first) > 18, "an epoch draws anew"


@pytest.mark.parametrize("reader", [Indexed(), Streaming(shuffle_buffer=1)])
def test_training_shows_crops_and_flips_of_the_image_and_validation_never(shard, reader):
    data = opened(shard, AUGMENT, reader)
    plain = opened(shard, Augment()).evaluation
    assert all(torch.equal(data.evaluation[n]["image"], plain[n]["image"]) for n in range(24))
    assert [data.evaluation[n]["text"] for n in range(24)] == [f"one {n}" for n in range(24)]
    found = Counter()
    for key, _, image in samples(data.source, 24):
        pixels = np.array(Image.open(io.BytesIO(dict(files(int(key)))[f"{key}.png"]))).transpose(2, 0, 1)
        crops = {(left, flip): flipped(pixels[:, :, left : left + 8], flip) for left, flip in POSITIONS}
        found[next(at for at, crop in crops.items() if np.array_equal(crop, image.numpy()))] += 1
    assert len(found) > 7, "of ten crops and flips"


POSITIONS = [(left, flip) for left in range(5) for flip in (False, True)]


def flipped(pixels: np.ndarray, flip: bool) -> np.ndarray:
    return pixels[:, :, ::-1] if flip else pixels


def latent(value: float) -> bytes:
    out = io.BytesIO()
    np.save(out, np.full((2, 1, 1), value, np.float16))
    return out.getvalue()


@pytest.fixture
def latents(tmp_path):
    members = [
        (f"{n:06d}.latent{kind}.npy", latent(sign * n)) for n in range(1, 25) for kind, sign in KINDS.items()
    ]
    return str(write_tar(tmp_path / "latents.tar", members))


KINDS = {"": 1, ".flip": -1}


@pytest.mark.parametrize("reader", [Indexed(), Streaming(shuffle_buffer=1)])
def test_a_flipped_latent_is_read_and_not_computed(latents, shard, reader):
    def values(flip: float) -> list[float]:
        augment = Augment(flip=flip)
        data = Shards(
            latents, shard, image_size=8, batch_size=4, fields=["latent"], augment=augment, reader=reader
        )
        return [float(x) for b in islice(data.train_dataloader(), 6) for x in b["latent"][:, 0, 0, 0]]

    assert sorted(values(0.0)) == [*range(1, 25)] and sorted(values(1.0)) == [*range(-24, 0)]
    assert 4 < sum(value < 0 for value in values(0.5)) < 20


def test_latents_without_flipped_ones_and_crops_of_latents_are_refused(tmp_path, shard):
    path = str(write_tar(tmp_path / "latents.tar", [(f"{n}.latent.npy", latent(n)) for n in range(4)]))

    def source(augment):
        return Shards(path, shard, image_size=8, batch_size=1, fields=["latent"], augment=augment).source

    with pytest.raises(
        ValueError, match=r"data\.augment\.flip: .* 4 of 4 samples of .* no latent\.flip\.npy"
    ):
        source(Augment(flip=0.5))
    with pytest.raises(ValueError, match=r"data\.augment\.crop: got random, but the latents"):
        source(Augment(crop="random"))
    assert source(Augment())[0]["latent"].shape == (2, 1, 1)


def test_impossible_augmentations_are_refused():
    with pytest.raises(ValueError, match=r"data\.augment\.flip: got 1\.5, expected a probability"):
        Augment(flip=1.5)
    for weights in ({}, {"long": 0.0}, {"long": float("nan")}):
        with pytest.raises(ValueError, match=r"data\.augment\.captions: got .*, expected keys with weights"):
            Augment(captions=weights)


def test_the_line_on_captions_counts_what_is_cut(shard):
    source = opened(shard, AUGMENT).source
    assert len(source.captions(10, seconds=60)) == 10 and len(source.captions(100, seconds=60)) == 24
    assert source.captions(10, seconds=0) == []
    expected = "captions: 4 tokens at the median, 9 at most, of 4; 25.0% are cut to the 8 that are read"
    assert lengths([3, 4, 4, 9], 8) == expected
