"""Shards on a Hugging Face Hub and in Google's store, by their own clients: as from a local copy."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import fsspec
import pytest
import torch
from gcs_server import BUCKET, Storage
from hub_server import REPOSITORY, Hub
from tiny_shards import png, write_tar

from benchmarks.remote.failing_server import serving
from ldm.cli import run_command
from ldm.data import remote
from ldm.data.cache import ShardCache
from ldm.data.module import Indexed
from ldm.data.source import DataRank, SampleSpec
from ldm.data.tar import expand

COUNTS = [7, 5, 9, 4, 6]
SPEC = SampleSpec(("image", "text"), 8, 5)
TRAIN = "train-{000000..000004}.tar"
THIRD = "web/train-000002.tar"
PIECE = 1 << 16
"""Bytes of a request, so that a shard is several."""


def prefetching():
    """Return the threads that stage shards once those end whose readers are gone."""
    gc.collect()
    found = [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    for thread in found:
        thread.join(10.0)
    return [thread for thread in found if thread.is_alive()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Shards of noise, of several requests each; there is one at a time of them in the cache."""
    monkeypatch.setattr(remote, "CHUNK", PIECE)
    monkeypatch.setattr(remote, "LEAST", PIECE)
    first = 0
    for shard, count in enumerate(COUNTS):
        rng = random.Random(shard)
        files = [
            (f"{n:06d}.{kind}", body)
            for n in range(first, first + count)
            for kind, body in (
                ("png", png(n)),
                ("txt", b"number %d" % n),
                ("bin", rng.randbytes(50_000)),
            )
        ]
        write_tar(tmp_path / "data" / "web" / f"train-{shard:06d}.tar", files)
        first += count
    return tmp_path / "data"


@pytest.fixture
def hub(folder, monkeypatch):
    """A Hub, whose client does not wait between its own tries, and the URL of its folder ``web``."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    with serving(folder, answers=Hub) as served:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": served.url})
        remote._made.cache_clear()
        yield served, f"hf://datasets/{REPOSITORY}/web"
        prefetching()  # of this test would ask the server of the next one: it has the same URLs
        remote._made.cache_clear()


@pytest.fixture
def bucket(folder, monkeypatch):
    """Google's store, whose client does not wait between its own tries, and the URL of its folder ``web``."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google by gRPC
    retry = pytest.importorskip("gcsfs.retry", reason="gs:// needs gcsfs")
    monkeypatch.setattr(retry, "asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))
    with serving(folder, answers=Storage) as served:
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": served.url, "token": "anon"})
        remote._made.cache_clear()
        yield served, f"gs://{BUCKET}/web"
        prefetching()
        remote._made.cache_clear()


@pytest.fixture(params=["hub", "bucket"])
def store(request, tmp_path, monkeypatch):
    """A server and the URL of its folder ``web``."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "default"))
    return request.getfixturevalue(request.param)


def reader(tmp_path, waits=(0.0, 0.0)) -> Indexed:
    found = Indexed(2, cache_dir=str(tmp_path / "cache"), cache_gb=1e-3)
    found.cache = replace(found.cache, waits=waits)
    return found


def batches(source, start=0, num=8, workers=0):
    loader = source.loader(lambda: start, 6, workers, DataRank(0, 1))
    return [(batch["key"], batch["text"], batch["image"]) for batch in islice(loader, num)]


def local(tmp_path, folder):
    return Indexed(2, str(tmp_path / "local")).open(str(folder / "web" / TRAIN), SPEC)


def assert_equal(found, expected):
    assert [batch[:2] for batch in found] == [batch[:2] for batch in expected]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_order_and_identity_are_those_of_local_files_from_any_position(store, folder, tmp_path, workers):
    expected = local(tmp_path, folder)
    source = reader(tmp_path).open(f"{store[1]}/{TRAIN}", SPEC)
    source.check()
    assert source.identity() == expected.identity()
    for start in (0, 17):
        assert_equal(batches(source, start, workers=workers), batches(expected, start))


def test_the_threads_that_stage_shards_end_with_their_reader(hub, tmp_path):
    prefetching()
    before = threading.enumerate()  # not their numbers: a new thread gets that of one which has ended
    source = reader(tmp_path).open(f"{hub[1]}/{TRAIN}", SPEC)
    batches(source, num=1)
    began = {thread.name for thread in threading.enumerate() if thread not in before}
    assert "prefetch" in began
    del source
    assert not prefetching()


def test_globs_and_folders_are_listed_and_hashes_known(store, folder, monkeypatch):
    expected = [f"{store[1]}/train-{n:06d}.tar" for n in range(5)]
    assert expand(f"{store[1]}/train-*.tar", "x") == expected
    single = {url: remote.version(url) for url in expected}
    monkeypatch.setattr(remote, "MANY", 1)
    assert remote.versions(expected) == single
    assert all(version.tag.startswith(("sha256:", "md5:")) for version in single.values())


def test_no_more_is_read_than_asked_for(store, folder):
    served, url = store
    assert remote.read(f"{url}/train-000002.tar", 1000, 500) == (folder / THIRD).read_bytes()[1000:1500]
    assert served.gets[THIRD] == [500]


def test_a_shard_written_anew_is_noticed_and_indexed_anew(store, folder, tmp_path):
    source = reader(tmp_path).open(f"{store[1]}/{TRAIN}", SPEC)
    changed = (folder / THIRD).read_bytes().replace(b"number 12", b"number XX")
    (folder / THIRD).write_bytes(changed)
    for staged in (tmp_path / "cache").glob("*.tar"):
        staged.unlink()
    with pytest.raises(ValueError, match=r"train-000002.tar: the shard changed since it was indexed"):
        batches(source)
    again = batches(reader(tmp_path).open(f"{store[1]}/{TRAIN}", SPEC))
    assert "number XX" in {text for batch in again for text in batch[1]}


@pytest.mark.parametrize("fault", [("cut", 0.5), ("status", 503), ("status", 429)])
def test_a_failure_in_the_middle_of_a_shard_costs_one_request(store, folder, tmp_path, fault):
    served, url = store
    served.fault = lambda name, count: fault if name == THIRD and count == 3 else None
    cache = reader(tmp_path).cache
    with cache.staged(f"{url}/train-000002.tar", cache.version(f"{url}/train-000002.tar")) as file:
        assert file.pread(file.size, 0) == (folder / THIRD).read_bytes()
    size = (folder / THIRD).stat().st_size
    assert len(served.gets[THIRD]) == -(-size // PIECE) + 1
    assert sum(served.gets[THIRD]) == size + (PIECE // 2 if fault[0] == "cut" else 0)


def test_a_broken_download_is_continued_by_another_process(store, folder, tmp_path):
    served, url = store
    served.fault = lambda name, count: ("cut", 0.5) if name == THIRD and count >= 3 else None
    version = remote.version(f"{url}/train-000002.tar")
    with pytest.raises(ConnectionError, match=r"train-000002.tar: 1 tries failed"):
        reader(tmp_path, ()).cache.staged(f"{url}/train-000002.tar", version)
    served.fault, before = (lambda name, count: None), len(served.gets[THIRD])
    with reader(tmp_path).cache.staged(f"{url}/train-000002.tar", version) as file:
        assert file.pread(file.size, 0) == (folder / THIRD).read_bytes()
    assert sum(served.gets[THIRD][before:]) == version.size - 3 * PIECE


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (("status", 404), 2, "train-000002.tar: no such file in the store"),
        (("status", 403), 2, "train-000002.tar: the store denies access"),
        (("status", 503), 75, "train-000002.tar: 3 tries failed ("),
        (("cut", 0.0), 75, "train-000002.tar: 3 tries failed ("),
    ],
)
def test_a_shard_that_stays_unreadable_is_named_in_one_line(store, tmp_path, capsys, fault, code, message):
    served, url = store
    served.fault = lambda name, count: fault if name == THIRD else None
    assert run_command(lambda: print(reader(tmp_path).open(f"{url}/{TRAIN}", SPEC))) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and len(error) <= 300
    served.fault = lambda name, count: None
    assert len(batches(reader(tmp_path).open(f"{url}/{TRAIN}", SPEC))) == 8


def test_what_is_not_there_or_does_not_answer_is_named(store, tmp_path):
    served, url = store
    cache = ShardCache(str(tmp_path / "cache"), waits=())
    for missing, message in {
        f"{url}/nothing.tar": "nothing.tar: no such file in the store",
        f"{url}/no/nothing.tar": "no/nothing.tar: no such file in the store",
        url: "no such shard, but a folder",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            cache.version(missing)
    assert cache.fetch(f"{url}/latents.json") is None
    with pytest.raises(FileNotFoundError, match="matches no file"):
        expand(f"{url}/nothing-*.tar", "x")
    served.fault = lambda name, count: ("status", 503)
    with pytest.raises(ConnectionError, match="tries failed") as error:
        cache.version(f"{url}/train-000000.tar")
    assert error.value.exit_code == 75


def test_revisions_and_foreign_datasets_of_a_hub(hub):
    _, url = hub
    at = url.replace(REPOSITORY, f"{REPOSITORY}@main")
    expected = remote.version(f"{url}/train-000000.tar")
    assert expand(f"{at}/train-*.tar", "x")[0] == f"{at}/train-000000.tar"
    assert remote.version(f"{at}/train-000000.tar") == expected
    with pytest.raises(FileNotFoundError, match="no such file"):
        remote.version(f"{url.replace(REPOSITORY, REPOSITORY + '@v9')}/train-000000.tar")
    with pytest.raises(PermissionError, match=r"the store denies access .*repository not found"):
        remote.version("hf://datasets/ann/other/a.tar")
