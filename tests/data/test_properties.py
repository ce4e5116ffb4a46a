"""What holds for any data: order, names, keys, members and captions, through writing and reading."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_shards import png, write_tar
from words import names, texts

from data.folder import pack_folder
from ldm.data.decode import BadSample, SampleId
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.fields import decode_sample, whitelist
from ldm.data.files import ShardFiles
from ldm.data.index import scan, summarize
from ldm.data.keys import overlapping, repeating
from ldm.data.order import Order
from ldm.data.source import DataRank, rank_batches
from ldm.data.tar import expand
from ldm.data.tar_stream import read_samples
from ldm.data.view import View
from ldm.data.writer import tar_writer
from ldm.io.images import read_text, write_png
from ldm.rng import SampleNoise
from ldm.sampling.prompts import BLANK, read_prompts

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
WORLDS = st.integers(1, 5)
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def interleaved(ranks: list[list[list[int]]]) -> list[int]:
    """Positions of the batches of all ranks, in the global order that they stand for."""
    steps = zip(*ranks, strict=True)
    return [position for batches in steps for row in zip(*batches, strict=True) for position in row]


@given(COUNTS, st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 10**9))
def test_each_epoch_holds_each_sample_once_wherever_it_begins(counts, seed, group_shards, epoch):
    order = Order(counts, seed, group_shards)
    start = epoch * len(order)
    found = [order.locate(position) for position in range(start, start + len(order))]
    assert sorted(found) == [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    middle = len(order) // 2
    assert Order(counts, seed, group_shards).locate(start + middle) == found[middle]


@given(st.integers(0, 10**6), st.lists(st.tuples(WORLDS, st.integers(1, 6), st.integers(1, 4)), max_size=4))
def test_runs_of_any_processes_and_batch_sizes_continue_one_order(start, parts):
    read: list[int] = []
    for world, batch_size, steps in parts:  # each part resumes where the one before ended
        begin = start + len(read)
        of_rank = (rank_batches(begin, batch_size, DataRank(rank, world)) for rank in range(world))
        ranks = [list(islice(batches, steps)) for batches in of_rank]
        read += interleaved(ranks)
    assert read == list(range(start, start + len(read)))
    assert len(read) == sum(world * batch_size * steps for world, batch_size, steps in parts)


@given(COUNTS, WORLDS, st.integers(1, 9))
def test_validation_reads_each_sample_once_in_equally_many_batches(counts, world, batch_size):
    files = ShardFiles([SimpleNamespace(count=count) for count in counts], None)
    samples = EvaluationSet(files, ["image"], 8)
    ranks = [list(samples.loader(batch_size, 0, DataRank(r, world)).batch_sampler) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    if len(samples) >= world:  # data.val refuses fewer
        assert all(0 < len(batch) <= batch_size + 1 for batches in ranks for batch in batches)
    for rank, batches in enumerate(ranks):
        assert [n for batch in batches for n in batch] == list(range(rank, sum(counts), world))


KINDS = [kind for kind in whitelist() if kind != "latent.npy"]
SAMPLES = st.dictionaries(
    st.builds(lambda folder, key: folder + key, st.sampled_from(["", "a/", "./", "x.y/z/"]), names(120)),
    st.dictionaries(st.sampled_from(KINDS), st.binary(max_size=700), min_size=1, max_size=4),
    min_size=1,
    max_size=8,
).filter(lambda found: len({normalize("NFC", key.removeprefix("./")) for key in found}) == len(found))


@given(SAMPLES, st.sampled_from(FORMATS), st.randoms(use_true_random=False), st.booleans())
def test_any_names_in_any_order_are_grouped_by_what_precedes_the_first_dot(
    samples, format, chance, is_sorted
):
    members = [
        (f"{key}.{kind.upper() if chance.random() < 0.5 else kind}", body)
        for key, found in samples.items()
        for kind, body in found.items()
    ]
    if not is_sorted:
        chance.shuffle(members)
    expected = {key.removeprefix("./"): found for key, found in samples.items()}
    with TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members, format)
        found, content = scan(str(path)), path.read_bytes()
        rows = range(len(found))
        spans = {found.key(row): found.spans(row, whitelist()) for row in rows}
        assert {k: {n: content[at : at + size] for n, at, size in s} for k, s in spans.items()} == expected
        assert found.lost == ()
        if is_sorted:  # members are neighbours
            assert list(read_samples(io.BytesIO(content), "a.tar")) == list(expected.items())


NUMBERS = st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=8)


@given(NUMBERS, texts("\0", max_size=20))
def test_shards_share_keys_as_sets_of_python_say(numbers, prefix):
    shards = [[f"{prefix}{number}" for number in of_shard] for of_shard in numbers]
    seen: set[str] = set()
    expected = set()
    for number, keys in enumerate(shards):
        expected |= {number} if seen & set(keys) else set()
        seen |= set(keys)
    groups = overlapping([(min(keys), max(keys)) for keys in shards])
    assert all(group == sorted(group) and len(group) > 1 for group in groups)
    found = set()
    for group in groups:
        found |= {group[n] for n in repeating([np.array([k.encode() for k in shards[i]]) for i in group])}
    assert found == expected


@given(st.dictionaries(names(), texts(), min_size=1, max_size=5))
@example({"a": "\ufeffcaption"})
def test_keys_and_captions_come_back_as_they_were_written(captions):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        with tar_writer(path) as writer:
            for key, caption in captions.items():
                meta = json.dumps({"captions": [caption]}).encode()
                writer.write({"__key__": key, "txt": caption.encode(), "json": meta})
        files = ShardFiles([summarize(str(path), None)], None)
        found = {}
        for row in range(files.summaries[0].count):
            members, sample = files.members(0, row, ("txt", "json"))
            assert sample.key == files.key(0, row)
            found[sample.key] = members
    joined = Counter(normalize("NFC", key) for key in captions)
    assert sum(joined.values()) == len(found), "keys that differ in their form alone both have all members"
    for key, caption in captions.items():
        for draw, text in ((None, caption.removeprefix("\ufeff")), (5, caption)):
            try:
                sample = decode_sample(found[key], SampleId("a.tar", key), ["text"], View(8, 8, draw=draw))
                assert sample["text"] == text.strip() != ""
            except BadSample as error:
                assert error.reason == "empty caption" and not text.strip()


@given(names(), names())
@example("set[1]", "train{0..3}")
@example("a{b", "*?")
@example("~", "~")
def test_a_shard_that_is_there_is_taken_by_its_name(folder, name):
    with TemporaryDirectory() as root:
        path = Path(root) / folder / f"{name}.tar"
        write_tar(path, [("0.txt", b"x")])
        assert expand(str(path), "data.train") == [str(path)]
        if not set("*?[~") & set(folder):
            assert expand(f"{root}/{folder}/*.tar", "data.train") == [str(path)]


@given(st.dictionaries(names(60), texts("", 1), min_size=2, max_size=5))
def test_a_folder_is_packed_whatever_its_files_are_called(captions):
    with TemporaryDirectory() as root:
        source, out = Path(root) / "images", Path(root) / "out"
        source.mkdir()
        for n, (name, caption) in enumerate(captions.items()):
            (source / f"{name}.png").write_bytes(png(n))
            (source / f"{name}.txt").write_text(caption, encoding="utf-8", newline="")
        stripped = {n: re.sub("\r\n?", "\n", c.removeprefix("\ufeff")).strip() for n, c in captions.items()}
        good = {f"{name}.png": text for name, text in stripped.items() if text}
        if not good:
            return
        pack_folder(source, out, val_fraction=0)
        files = ShardFiles([summarize(str(out / "train-000000.tar"), None)], None)
        found = {}
        for row in range(files.summaries[0].count):
            sample = files.sample(0, row, ["image", "text"], View(8, 8))
            meta = json.loads(files.members(0, row, ("json",))[0]["json"])
            found[meta["file"]] = sample["text"]
        assert found == good


@given(texts("\0"))
def test_an_image_file_says_what_it_was_drawn_for(prompt):
    with TemporaryDirectory() as root:
        path = Path(root) / "a.png"
        write_png(path, torch.zeros(3, 2, 2, dtype=torch.uint8), {"prompt": prompt, "key": prompt})
        assert read_text(path) == {"prompt": prompt, "key": prompt}


@given(st.lists(texts("\0\r\n").map(lambda text: text.strip(BLANK)).filter(bool), min_size=1, max_size=5))
def test_prompts_are_read_as_they_were_typed(prompts):
    with TemporaryDirectory() as root:
        path = Path(root) / "prompts.txt"
        path.write_text("\n".join(prompts), encoding="utf-8", newline="")
        assert read_prompts(str(path)) == prompts


@given(st.lists(texts(), min_size=1, max_size=6, unique=True), st.integers(0, 6), st.integers())
def test_the_noise_of_a_sample_does_not_know_its_batch(keys, cut, seed):
    like = torch.empty(1, 2, 2)
    whole = SampleNoise(seed, keys).like(like.expand(len(keys), 1, 2, 2))
    parts = [part for part in (keys[:cut], keys[cut:]) if part]
    split = torch.cat([SampleNoise(seed, part).like(like.expand(len(part), 1, 2, 2)) for part in parts])
    assert torch.equal(whole, split)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(keys)
