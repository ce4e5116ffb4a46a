"""Readers without the Trainer: evaluation, real sets, bad samples, and webdataset's pipeline."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import png, sample, write_tar

from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.source import DataRank, SampleSpec

SPEC = SampleSpec(("image", "text"), 8, 5)
READERS = [Indexed(), Streaming(shuffle_buffer=1)]


def keys_of(loader, num_batches: int) -> list[str]:
    return [key for batch in islice(loader, num_batches) for key in batch["key"]]


@pytest.mark.parametrize("counts", [[7, 5], [1, 1, 1], [16], [3, 9, 1]])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
def test_evaluation_reads_each_sample_once_over_all_ranks_in_equally_many_batches(shards, counts, batch_size):
    evaluation = Indexed().evaluation(shards(counts), 8)
    for world in (1, 2, 3):
        loaders = [evaluation.loader(batch_size, 0, DataRank(rank, world)) for rank in range(world)]
        assert len({len(loader) for loader in loaders}) == 1
        ranks = [[batch["key"] for batch in loader] for loader in loaders]
        assert all(1 <= len(batch) <= batch_size + 1 for rank in ranks for batch in rank)
        flat = [[key for batch in rank for key in batch] for rank in ranks]
        everything = [f"{n:06d}" for n in range(sum(counts))]
        assert flat == [everything[rank::world] for rank in range(world)]


def test_evaluation_in_workers_keeps_the_order(shards):
    evaluation = Indexed().evaluation(shards([7, 6]), 8)
    assert keys_of(evaluation.loader(2, 2, DataRank(0, 1)), 99) == [f"{n:06d}" for n in range(13)]


def test_evaluation_loads_what_all_shards_have_and_takes_the_canonical_caption(tmp_path):
    with_class = [*sample(0)[:2], ("000000.cls", b"4")]
    write_tar(tmp_path / "v0.tar", with_class)
    write_tar(tmp_path / "v1.tar", sample(1))
    only_text = [*sample(2)[:1], ("000002.txt", b"two")]
    assert Indexed().evaluation(str(tmp_path / "v*.tar"), 8).fields == ("image", "text", "label")
    write_tar(tmp_path / "v2.tar", only_text)
    evaluation = Indexed().evaluation(str(tmp_path / "v*.tar"), 8)
    assert evaluation.fields == ("image", "text")
    assert [evaluation[n]["text"] for n in range(3)] == ["number 0", "number 1", "two"]


def test_a_bad_sample_of_an_evaluation_keeps_its_key_and_shows_the_next_good_one(tmp_path):
    write_tar(tmp_path / "v.tar", [*sample(0), *sample(1), ("000002.png", png(2)[:40]), ("000002.txt", b"y")])
    evaluation = Indexed().evaluation(str(tmp_path / "v.tar"), 8)
    (batch,) = evaluation.loader(4, 0, DataRank(0, 1))
    assert batch["key"] == ["000000", "000001", "000002"]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 0]
    ((reason, message),) = batch["skipped"]
    assert reason == "unreadable image"
    assert message.startswith(f"{tmp_path}/v.tar: sample '000002', member 'png': its 40 bytes are no")


def test_fields_that_are_not_read_may_be_bad(tmp_path):
    """Class names for labels, foreign layouts, maps and masks of other meaning, empty captions."""
    odd = b'{"caption": "", "label": "cat", "layout": "wide", "width": 9, "height": 9}'
    foreign = [("0.json", odd), ("0.cls", b"n01440764"), ("0.map.png", png(0)), ("0.mask.png", b"x")]
    path = str(write_tar(tmp_path / "v.tar", [("0.png", png(7)), *foreign, ("0.latent.npy", b"pickle")]))
    evaluation = Indexed().evaluation(path, 8)
    assert set(evaluation[0]) == {"key", "image"}
    with pytest.raises(
        ValueError, match=r"data.val: image and label are read, but .*'cls': the label is 'n01"
    ):
        Indexed().evaluation(path, 8, reads=lambda stored: ["label"])


def test_fields_that_some_samples_lack_are_left_out(tmp_path):
    write_tar(tmp_path / "v.tar", [*sample(0), *sample(1)[:1], ("000001.txt", b" "), *sample(1)[2:]])
    evaluation = Indexed().evaluation(str(tmp_path / "v.tar"), 8)
    (batch,) = evaluation.loader(2, 0, DataRank(0, 1))
    assert set(batch) == {"key", "image", "label"}


@pytest.mark.parametrize("reads", [[], ["text"]])
def test_samples_without_captions_are_counted_before_training_and_replaced(tmp_path, reads):
    files = [file for n in range(10) for file in sample(n)[:2] if file[0] != "000007.txt"]
    path = str(write_tar(tmp_path / "v.tar", files))
    message = rf"1 of 10 samples lack 'text', e.g. '000007' of {path}: others take their places"
    with pytest.warns(UserWarning, match=f"data.fields: {message}"):
        source = Indexed().open(path, SPEC)
    batch = next(iter(source.loader(lambda: 0, 10, 0, DataRank(0, 1))))
    assert len(set(batch["key"])) == 9 and "'txt or json': missing" in batch["skipped"][0].message
    if reads:
        with pytest.warns(UserWarning, match=f"data.val: {message}"):
            evaluation = Indexed().evaluation(path, 8, reads=lambda stored: reads)
        assert [evaluation[7][name] for name in ("key", "text")] == ["000007", "number 8"]
    else:
        assert Indexed().evaluation(path, 8).fields == ("image",)


def test_empty_shards_are_left_out_and_counted(tmp_path, shards):
    pattern = shards([2, 1, 2])
    (tmp_path / "shards/train-000001.tar").write_bytes(bytes(1024))
    with pytest.warns(UserWarning, match=r"data.train: 1 of 3 shards are empty, e.g. .*train-000001.tar"):
        source = Indexed().open(pattern, SPEC)
    assert sorted(source[n]["key"] for n in range(4)) == ["000000", "000001", "000003", "000004"]
    with pytest.raises(ValueError, match=r"data.val: empty shard .*train-000001.tar: found no member at all"):
        Indexed().evaluation(str(tmp_path / "shards/train-000001.tar"), 8)


def test_ignored_members_are_reported(tmp_path):
    dotted = [("img_1.5x.png", b"x"), ("img_1.5x.txt", b"y")]
    path = str(write_tar(tmp_path / "a.tar", [*sample(0), *dotted]))
    with pytest.warns(UserWarning, match=r"data.train: 2 members are ignored, e.g. 'img_1.5x.png' \(its key"):
        Indexed().open(path, SPEC)


def test_validation_shards_need_images(tmp_path):
    write_tar(tmp_path / "v.tar", [("0.txt", b"x")])
    with pytest.raises(
        ValueError, match=r"data.val: asks for \['image'\], but .*v.tar has 1 samples with .*txt \(1\)"
    ):
        Indexed().evaluation(str(tmp_path / "v.tar"), 8)


def img2dataset_shard(path) -> None:
    """A shard as img2dataset writes it: KEY.jpg, KEY.txt, KEY.json with metadata of the download."""
    files = []
    for n in range(6):
        key, jpg = f"00000{n:04d}", io.BytesIO()
        Image.new("RGB", (24 + 4 * n, 40), (40 * n, 0, 0)).save(jpg, "JPEG")
        caption = f"photo {n}"
        facts = {
            "caption": caption,
            "url": "https://x/y.jpg",
            "key": key,
            "status": "success",
            "error_message": None,
        }
        facts |= {"width": 24 + 4 * n, "height": 40, "original_width": 800, "exif": "{}", "sha256": "0" * 64}
        files += [(f"{key}.jpg", jpg.getvalue()), (f"{key}.json", json.dumps(facts).encode())]
        files += [(f"{key}.txt", caption.encode())]
    write_tar(path, files)


@pytest.mark.parametrize("reader", READERS)
def test_shards_of_img2dataset_are_read_as_they_are(tmp_path, reader):
    img2dataset_shard(tmp_path / "00000.tar")
    module = Shards(
        str(tmp_path / "{00000..00000}.tar"),
        str(tmp_path / "*.tar"),
        image_size=16,
        batch_size=6,
        reader=reader,
    )
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (6, 3, 16, 16)
    order = np.argsort(batch["key"])
    assert [batch["text"][i] for i in order] == [f"photo {n}" for n in range(6)]
    reds = batch["image"][torch.as_tensor(order), 0].float().mean((1, 2))
    assert (reds - 40 * torch.arange(6)).abs().max() < 4
    assert set(next(iter(module.val_dataloader()))) == {"key", "image", "text"}


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("reader", READERS)
def test_pickles_in_shards_are_ignored(tmp_path, reader):
    trap = pickle.dumps(_Trap())
    extra = [("000000.pkl", trap), ("000000.pyd", trap), ("000000.pth", trap), ("000000.pickle", trap)]
    path = str(write_tar(tmp_path / "t.tar", [*sample(0), *extra, *sample(1)]))
    module = Shards(path, path, image_size=8, batch_size=2, reader=reader)
    assert sorted(next(iter(module.train_dataloader()))["key"]) == ["000000", "000001"]


@pytest.mark.parametrize("reader", READERS)
def test_pipe_urls_are_refused_before_anything_runs(tmp_path, shards, reader):
    mark = tmp_path / "ran"
    for pattern in (f"pipe:touch {mark}", [shards([2]), f"PIPE:touch {mark}"]):
        with pytest.raises(ValueError, match="'pipe:' is refused"):
            reader.open(pattern, SPEC)
    with pytest.raises(ValueError, match=r"data.val: .*'pipe:' is refused"):
        reader.prepare(shards([2]), f"pipe:touch {mark}")
    assert not mark.exists()


@pytest.mark.parametrize("reader", READERS)
def test_images_are_not_read_if_only_latents_are_requested(tmp_path, reader):
    array = io.BytesIO()
    np.save(array, np.ones((8, 2, 2), np.float16))
    files = []
    for n in range(4):
        files += [(f"{n}.png", b"no image"), (f"{n}.txt", b"x"), (f"{n}.latent.npy", array.getvalue())]
    path = str(write_tar(tmp_path / "t.tar", files))
    source = reader.open(path, SampleSpec(("latent", "text"), 8, 0))
    batch = next(iter(source.loader(lambda: 0, 4, 0, DataRank(0, 1))))
    assert set(batch) - {"turn"} == {"key", "latent", "text"}
    assert batch["latent"].shape == (4, 8, 2, 2)


@pytest.mark.parametrize("reader", READERS)
def test_only_bad_samples_stop_training(tmp_path, reader):
    files = [*sample(0)]
    for n in range(1, 300):
        files += [(f"{n:06d}.png", b"x"), (f"{n:06d}.txt", b"y")]
    source = reader.open(str(write_tar(tmp_path / "t.tar", files)), SPEC)
    with pytest.raises(
        ValueError, match=r"100 samples in a row cannot be used, the last one: .*t.tar: sample"
    ):
        for _ in islice(source.loader(lambda: 0, 1, 0, DataRank(0, 1)), 300):
            pass


def test_a_shard_that_changes_under_a_run_is_noticed(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample(0), *sample(1)])
    source = Indexed().open(str(path), SPEC)
    write_tar(path, [*sample(0), *sample(1), *sample(2), *sample(3)])
    with pytest.raises(ValueError, match=r"t.tar: the shard changed while it is being read"):
        next(iter(source.loader(lambda: 0, 2, 0, DataRank(0, 1))))


def test_a_source_travels_to_other_processes_with_its_files_closed(shards):
    source = Indexed().open(shards([4, 5]), SPEC)
    expected = [source[position]["key"] for position in range(9)]
    copy = pickle.loads(pickle.dumps(source))
    assert source.sets[""].files._open and not copy.sets[""].files._open
    assert [copy[position]["key"] for position in range(9)] == expected


def test_streaming_splits_shards_between_ranks_and_workers_without_duplicates(shards):
    pattern = shards([4] * 12)
    seen: Counter[str] = Counter()
    for rank in range(3):
        source = Streaming(shuffle_buffer=1).open(pattern, SPEC)
        seen.update(keys_of(source.loader(lambda: 0, 4, 2, DataRank(rank, 3)), 4))
    assert sum(seen.values()) == 48
    assert set(seen.values()) == {1}


def test_streaming_gives_every_worker_data_even_with_one_shard(shards):
    source = Streaming().open(shards([6]), SPEC)
    assert set(keys_of(source.loader(lambda: 0, 3, 2, DataRank(1, 2)), 4)) == {f"{n:06d}" for n in range(6)}


def test_streaming_is_reproducible_shuffles_and_changes_with_the_seed(shards):
    pattern = shards([20, 20])

    def keys(seed, buffer=20):
        source = Streaming(buffer).open(pattern, SampleSpec(("image", "text"), 8, seed))
        return keys_of(source.loader(lambda: 0, 8, 0, DataRank(0, 1)), 10)

    assert keys(5) == keys(5) != keys(6)
    assert keys(5)[:20] != sorted(keys(5)[:20])
    assert keys(5, buffer=1)[:20] == sorted(keys(5, buffer=1)[:20])


def test_streaming_draws_captions_by_seed_and_key_and_not_by_worker(shards):
    pattern = shards([12])

    def texts(workers):
        source = Streaming(1).open(pattern, SPEC)
        batches = islice(source.loader(lambda: 0, 12, workers, DataRank(0, 1)), 1)
        return [text for batch in batches for text in batch["text"]]

    assert texts(0) == texts(1)
    assert {text[-1] for text in texts(0)} == set("abc")


def test_streaming_drops_and_reports_bad_samples(tmp_path):
    files = [*sample(0), ("000001.png", png(1)), ("000001.txt", b" "), *sample(2)]
    source = Streaming(1).open(str(write_tar(tmp_path / "t.tar", files)), SPEC)
    batch = next(iter(source.loader(lambda: 0, 2, 0, DataRank(0, 1))))
    assert batch["key"] == ["000000", "000002"]
    what = f"{tmp_path}/t.tar: sample '000001', member 'txt': the caption is empty"
    assert batch["skipped"] == [("empty caption", what)]


def test_streaming_refuses_scattered_members_of_a_sample(tmp_path):
    files = sorted((file for n in range(3) for file in sample(n)[:2]), key=lambda file: file[0][-3:])
    path = str(write_tar(tmp_path / "t.tar", files))
    with pytest.raises(ValueError, match=r"'000000', .*missing: .*must be neighbours \(tar --sort=name\)"):
        Streaming().open(path, SPEC)
    (batch,) = Indexed().evaluation(path, 8).loader(3, 0, DataRank(0, 1))
    assert batch["text"] == ["number 0", "number 1", "number 2"]


def test_streaming_distinguishes_equal_keys_of_two_shards(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [*sample(0), *sample(1)])
    source = Streaming(1).open(str(tmp_path / "*.tar"), SPEC)
    keys = keys_of(source.loader(lambda: 0, 4, 0, DataRank(0, 1)), 1)
    assert keys == ["000000", "000001", "000000@1", "000001@1"]


def test_streaming_begins_with_bad_samples_and_empty_shards(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(1024))
    write_tar(tmp_path / "1.tar", [*sample(0)[:1], *sample(1)])
    source = Streaming(1).open(str(tmp_path / "*.tar"), SPEC)
    assert keys_of(source.loader(lambda: 0, 2, 0, DataRank(0, 1)), 1) == ["000001"] * 2


def test_streaming_names_a_broken_shard(tmp_path, shards):
    path = write_tar(tmp_path / "t.tar", sample(0))
    path.write_bytes(path.read_bytes()[:560])
    with pytest.raises(ValueError, match=r"t.tar: cannot be read as a tar"):
        Streaming().open(str(path), SPEC)
    path.write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"t.tar: empty shard"):
        Streaming().open(str(path), SPEC)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="group_shards: got 0"):
        Indexed(group_shards=0)
    with pytest.raises(ValueError, match="shuffle_buffer: got 0"):
        Streaming(shuffle_buffer=0)
