"""The cache of staged shards: bounded, shared, and safe against processes that die."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from tiny_shards import png, write_tar

from benchmarks.remote.failing_server import serving
from ldm.data import cache as module
from ldm.data.cache import ShardCache
from ldm.data.files import ShardFiles
from ldm.data.index import summarize_all
from ldm.data.module import Indexed
from ldm.data.order import Order
from ldm.data.sets import TrainSet
from ldm.data.source import DataRank, SampleSpec

SPEC = SampleSpec(("image", "text"), 8, 5)
COUNT, SHARDS, SIZE = 5, 8, 266_240


@pytest.fixture
def folder(tmp_path):
    for shard in range(SHARDS):
        rng = Random(shard)
        files = [
            (f"{shard * COUNT + n:06d}.{kind}", body)
            for n in range(COUNT)
            for kind, body in (("png", png(n)), ("txt", b"x"), ("bin", rng.randbytes(50_000)))
        ]
        write_tar(tmp_path / "data" / f"{shard}.tar", files)
        assert (tmp_path / "data" / f"{shard}.tar").stat().st_size == SIZE
    return tmp_path / "data"


@contextmanager
def opening(folder, tmp_path, shards=2.5, **server):
    """Serve the folder; give a cache for some shards, and how to stage the n-th of them."""
    with serving(folder, **server) as served:
        cache = ShardCache(str(tmp_path / "cache"), shards * SIZE / 1e9, (0.0,))

        def stage(shard, **more):
            url = f"{served.url}/{shard}.tar"
            return cache.staged(url, cache.version(url), **more)

        yield served, cache, stage


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def staged(cache):
    return sorted(path.name[0] for path in cache.path.glob("*.tar*"))


class Watch:
    """Measures the folder of a cache as fast as it can."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak, self._ends = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        self._thread.join()

    def _run(self):
        while not self._ends.is_set():
            size = sum(self._size(path) for path in self.folder.glob("*.tar*"))
            self.peak = max(self.peak, size)
            time.sleep(0.002)

    def _size(self, path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0


@pytest.mark.parametrize(("workers", "shards"), [(3, 4.5), (2, 2.1)])
def test_the_bound_holds_while_several_processes_read(tmp_path, folder, workers, shards):
    local = Indexed(2, index_dir=str(tmp_path / "local")).open(str(folder / "{0..7}.tar"), SPEC)
    expected = [batch["key"] for batch in islice(local.loader(lambda: 3, 4, 0, DataRank(0, 1)), 25)]
    with serving(folder) as served, Watch(tmp_path / "cache") as watch:
        reader = Indexed(2, cache_dir=str(tmp_path / "cache"), cache_gb=shards * SIZE / 1e9)
        source = reader.open(f"{served.url}/{{0..7}}.tar", SPEC)
        loader = source.loader(lambda: 3, 4, workers, DataRank(0, 1))
        assert [batch["key"] for batch in islice(loader, 25)] == expected
    assert SIZE < watch.peak <= reader.cache.max_bytes


def test_a_shard_comes_once_for_all_who_wait_for_it(tmp_path, folder):
    slow = lambda name, count: ("slow", 0.2)  # noqa: E731
    with opening(folder, tmp_path, fault=slow) as (served, _, stage), ThreadPoolExecutor(6) as pool:
        files = list(pool.map(stage, [3] * 6))
        assert len({file.pread(SIZE, 0) for file in files}) == 1
    assert served.gets["3.tar"] == [SIZE]


def test_the_least_recently_used_goes_first_but_not_one_in_use(tmp_path, folder):
    with opening(folder, tmp_path, 3.0) as (_, cache, stage):
        in_use = stage(0)
        for n in (1, 2, 1, 3):
            stage(n).close()
            time.sleep(0.02)  # the times of files advance in ticks of up to 10 ms
        assert staged(cache) == ["0", "1", "3"]
        in_use.close()
        stage(4).close()
        assert staged(cache) == ["1", "3", "4"]


def test_a_shard_that_loses_its_name_stays_readable(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.1)
    with opening(folder, tmp_path, 1.0) as (_, cache, stage):
        first = stage(0)
        with pytest.warns(UserWarning, match="cache_gb: the shards that are read at the same time"):
            second = stage(1)
        assert staged(cache) == ["1"]
        for n, file in enumerate((first, second)):
            assert file.pread(SIZE, 0) == (folder / f"{n}.tar").read_bytes()


def test_a_reader_without_room_waits_for_one_that_ends(tmp_path, folder):
    with opening(folder, tmp_path, 1.0) as (_, cache, stage), ThreadPoolExecutor(1) as pool:
        first = stage(0)
        second = pool.submit(stage, 1)
        time.sleep(0.3)
        assert staged(cache) == ["0"] and not second.done()
        first.close()
        second.result().close()
        assert staged(cache) == ["1"]


def test_a_shard_larger_than_the_cache_is_an_error(tmp_path, folder):
    with (
        opening(folder, tmp_path, 0.9) as (_, _, stage),
        pytest.raises(
            ValueError, match=r"0.tar: the shard has 0.000266 GB, expected at most 0.00024 \(data.reader"
        ),
    ):
        stage(0)


def test_what_a_killed_process_began_is_finished_by_another(tmp_path, folder):
    plan = [("cut", 0.5), ("slow", 60.0)]
    with opening(folder, tmp_path, fault=lambda name, n: plan[n] if n < 2 else None) as (
        served,
        cache,
        stage,
    ):
        if not (child := os.fork()):
            stage(0)
            os._exit(0)
        part = cache.path / f"0-*.tar{module.PART}{SIZE}"
        wait_for(lambda: len(served.gets["0.tar"]) == 2 and any(cache.path.glob(part.name)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with stage(0) as file:
            assert file.pread(SIZE, 0) == (folder / "0.tar").read_bytes()
    assert 0 < served.gets["0.tar"][2] < SIZE
    assert staged(cache) == ["0"]


def test_leftovers_give_room(tmp_path, folder):
    fault = lambda name, n: ("cut", 0.5 * (n == 0)) if name == "0.tar" else None  # noqa: E731
    with opening(folder, tmp_path, 1.0, fault=fault) as (_, cache, stage):
        with pytest.raises(ConnectionError):
            stage(0)
        assert staged(cache) == ["0"]
        stage(1).close()
        assert staged(cache) == ["1"]


def test_a_damaged_file_of_the_cache_comes_again(tmp_path, folder):
    with opening(folder, tmp_path) as (served, cache, stage):
        stage(0).close()
        path = next(cache.path.glob("0-*"))
        os.truncate(path, 100)
        with stage(0) as file:
            assert file.pread(SIZE, 0) == (folder / "0.tar").read_bytes()
    assert served.gets["0.tar"] == [SIZE, SIZE]


def test_a_shard_that_arrives_damaged_comes_again_once(tmp_path, folder):
    content = (folder / "0.tar").read_bytes()
    sha256, damaged = hashlib.sha256(content).hexdigest(), {0}
    flip = lambda name, count: ("flip", 0.0) if count in damaged else None  # noqa: E731
    with opening(folder, tmp_path, fault=flip) as (served, cache, stage):
        with stage(0, sha256=sha256) as file:
            assert file.pread(SIZE, 0) == content
        assert served.gets["0.tar"] == [SIZE, SIZE]
        next(cache.path.glob("0-*")).unlink()
        damaged |= {2, 3}
        with pytest.raises(ValueError, match=r"0.tar: the shard changed since it was indexed: sha256 "):
            stage(0, sha256=sha256)


def test_files_of_others_in_the_folder_stay(tmp_path, folder):
    with opening(folder, tmp_path, 1.0) as (_, cache, stage):
        cache.path.mkdir()
        for name in ("train-000000.tar", "a.tar.part-9"):
            (cache.path / name).write_bytes(bytes(2 * SIZE))
        stage(0).close()
        stage(1).close()
        assert len([*cache.path.glob("*.tar*")]) == 3


def test_a_full_disk_is_said_in_one_line(tmp_path, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opening(folder, tmp_path) as (_, _, stage):
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
        try:
            with pytest.raises(
                OSError, match=r"cache: no room for shards \(File too large\): lower data.reader"
            ):
                stage(0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_who_reads_through_workers_or_is_done_uses_no_shard(tmp_path, folder):
    with serving(folder) as served:
        reader = Indexed(2, cache_dir=str(tmp_path / "cache"))
        source = reader.open(f"{served.url}/{{0..7}}.tar", SPEC)
        next(iter(source.loader(lambda: 0, 4, 1, DataRank(0, 1))))
        files = ShardFiles(summarize_all([f"{served.url}/3.tar"], None, reader.cache), None, reader.cache)
        files.members(0, 0, ["txt"])
        assert [is_free(path) for path in reader.cache.path.glob("3-*.tar")] == [False]
        del files
        assert all(map(is_free, reader.cache.path.glob("*.tar")))


def test_validation_keeps_one_shard_in_use(tmp_path, folder):
    with serving(folder) as served:
        reader = Indexed(cache_dir=str(tmp_path / "cache"))
        samples = reader.evaluation(f"{served.url}/{{0..7}}.tar", 8)
        assert [samples[n]["key"] for n in range(len(samples))] == [f"{n:06d}" for n in range(SHARDS * COUNT)]
        wait_for(
            lambda: (
                [is_free(path) for path in sorted(reader.cache.path.glob("*.tar"))] == 7 * [True] + [False]
            )
        )


def test_sets_that_are_read_together_share_the_cache(tmp_path, folder):
    with serving(folder) as served:
        reader = Indexed(2, cache_dir=str(tmp_path / "cache"), cache_gb=8 * SIZE / 1e9)
        sets = {
            name: {"shards": f"{served.url}/{{{names}}}.tar", "weight": 1.0}
            for name, names in MIXTURE.items()
        }
        source = reader.open({name: TrainSet(**of) for name, of in sets.items()}, SPEC)
        seen = {source[n]["key"] for n in range(3 * SHARDS * COUNT)}
        assert len(seen) == SHARDS * COUNT
        assert sum(not is_free(path) for path in reader.cache.path.glob("*.tar")) <= 4


MIXTURE = {"a": "0..3", "b": "4..7"}


def is_free(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_what_does_not_fit_together_is_said(tmp_path, folder):
    with serving(folder) as served:
        reader = Indexed(4, cache_dir=str(tmp_path / "cache"), cache_gb=2 * SIZE / 1e9)
        source = reader.open(f"{served.url}/{{0..7}}.tar", SPEC)
        with pytest.warns(
            UserWarning, match=r"cache_gb: 0.000532, but 4 shards of 0.00106 GB are read together"
        ):
            keys = [source[n]["key"] for n in range(SHARDS * COUNT)]
    assert sorted(keys) == [f"{n:06d}" for n in range(SHARDS * COUNT)]


def test_the_next_shards_come_before_they_are_read(tmp_path, folder):
    with serving(folder) as served:
        reader = Indexed(2, cache_dir=str(tmp_path / "cache"), cache_gb=1.0)
        source = reader.open(f"{served.url}/{{0..7}}.tar", SPEC)
        for path in reader.cache.path.glob("*.tar"):
            path.unlink()
        source = pickle.loads(pickle.dumps(source))  # as a process that is spawned gets it
        source[0]
        order = Order([COUNT] * SHARDS, SPEC.seed, 2)
        now, later = order.upcoming(0)
        wait_for(lambda: staged(reader.cache) == sorted(str(n) for n in (*now, *later)))
        assert len(staged(reader.cache)) == 4
        source[2 * COUNT]
        assert set(order.upcoming(2 * COUNT)[0]) == set(later)
        wait_for(lambda: len(staged(reader.cache)) == 6)
