"""Remote shards, over a real HTTP server that fails on demand: the same samples as from local files."""

from __future__ import annotations

import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny_shards import png, sample, write_shards, write_tar

from benchmarks.remote.failing_server import serving
from ldm.cli import run_command
from ldm.data import patience
from ldm.data.__main__ import index
from ldm.data.cache import ShardCache
from ldm.data.index import load_index, summarize_all
from ldm.data.module import Indexed
from ldm.data.source import DataRank, SampleSpec
from ldm.data.tar import expand

COUNTS = [7, 5, 9, 4, 6]
SPEC = SampleSpec(("image", "text"), 8, 5)
NAMES = "train-{000000..000004}.tar"


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "default"))


@pytest.fixture
def folder(tmp_path):
    """Shards of noise, so that they are larger than what a socket holds."""
    for shard, count in enumerate(COUNTS):
        rng = random.Random(shard)
        files = [
            (f"{sum(COUNTS[:shard]) + n:06d}.{kind}", body)
            for n in range(count)
            for kind, body in (
                ("png", png(n)),
                ("txt", f"{shard} {n}".encode()),
                ("bin", rng.randbytes(50_000)),
            )
        ]
        write_tar(tmp_path / "data" / f"train-{shard:06d}.tar", files)
    return tmp_path / "data"


def reader(tmp_path, name="cache", waits=(0.0, 0.0), gb=1e-2) -> Indexed:
    found = Indexed(2, cache_dir=str(tmp_path / name), cache_gb=gb)
    found.cache = replace(found.cache, waits=waits)
    return found


def batches(source, start=0, num=8, workers=0):
    return list(islice(source.loader(lambda: start, 6, workers, DataRank(0, 1)), num))


def local(tmp_path, folder):
    return Indexed(2, index_dir=str(tmp_path / "local")).open(str(folder / NAMES), SPEC)


def assert_equal(found, expected):
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    assert [batch["text"] for batch in found] == [batch["text"] for batch in expected]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True))


FAULTS = {
    "cut": lambda name, count: ("cut", 0.4) if count % 3 else None,
    "late cut": lambda name, count: ("cut", 0.99) if count < 2 else None,
    "503": lambda name, count: ("status", 503) if count < 2 else None,
    "429, then cut": lambda name, count: [("status", 429), ("cut", 0.1), None][count % 3],
    "slow": lambda name, count: ("slow", 0.05),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_sample_is_lost_or_doubled_by_a_server_that_fails(tmp_path, folder, fault):
    expected = local(tmp_path, folder)
    with serving(folder, fault=FAULTS[fault]) as served:
        source = reader(tmp_path).open(f"{served.url}/{NAMES}", SPEC)
        assert source.identity() == expected.identity()
        found = batches(source, num=2 * sum(COUNTS) // 6)
    assert_equal(found, batches(expected, num=len(found)))
    seen = Counter(key for batch in found for key in batch["key"])
    assert len(seen) == sum(COUNTS) and set(seen.values()) <= {1, 2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("server", [{}, {"ranges": False}, {"etags": False}])
def test_all_servers_give_the_samples_of_local_files_from_any_position(tmp_path, folder, server, workers):
    expected = local(tmp_path, folder)
    with serving(folder, **server) as served:
        source = reader(tmp_path).open(f"{served.url}/{NAMES}", SPEC)
        assert_equal(batches(source, 17, workers=workers), batches(expected, 17))


def test_a_broken_download_goes_on_where_it_broke(tmp_path, folder):
    url, size = "train-000002.tar", (folder / "train-000002.tar").stat().st_size
    with serving(folder, fault=lambda name, count: ("cut", 0.5) if count < 6 else None) as served:
        cache = reader(tmp_path, waits=()).cache
        version = cache.version(f"{served.url}/{url}")
        with pytest.raises(ConnectionError, match=r"1 tries failed"):
            cache.staged(f"{served.url}/{url}", version)
        again = reader(tmp_path, waits=(0.0,)).cache  # another process
        with again.staged(f"{served.url}/{url}", version) as file:
            assert file.pread(file.size, 0) == (folder / url).read_bytes()
        assert sum(served.gets[url]) == size and len(served.gets[url]) == 7


def test_without_ranges_it_begins_anew(tmp_path, folder):
    url = "train-000002.tar"
    broken = lambda name, count: ("cut", 0.5) if count == 0 else None  # noqa: E731
    with serving(folder, ranges=False, fault=broken) as served:
        cache = reader(tmp_path).cache
        with cache.staged(f"{served.url}/{url}", cache.version(f"{served.url}/{url}")) as file:
            assert file.pread(file.size, 0) == (folder / url).read_bytes()


@pytest.mark.parametrize(
    ("fault", "code", "tries", "message"),
    [
        (("status", 404), 2, 1, "train-000003.tar: no such file in the store"),
        (("status", 403), 2, 1, "train-000003.tar: the store denies access"),
        (("status", 500), 75, 3, "train-000003.tar: 3 tries failed (500"),
        (("cut", 0.0), 75, 3, "train-000003.tar: 3 tries failed ("),
    ],
)
def test_a_shard_that_stays_unreadable_is_named_in_one_line(
    tmp_path, folder, capsys, fault, code, tries, message
):
    with serving(folder, fault=lambda name, _: fault if name == "train-000003.tar" else None) as served:
        pattern = f"{served.url}/{NAMES}"
        assert run_command(lambda: print(reader(tmp_path).open(pattern, SPEC))) == code
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error and len(error) <= 300
        assert len(served.gets["train-000003.tar"]) == tries
        served.fault = lambda name, count: None
        source = reader(tmp_path).open(pattern, SPEC)
    assert source.identity() == local(tmp_path, folder).identity()


def test_a_worker_ends_with_the_same_exit_code(tmp_path, folder, capsys):
    with serving(folder) as served:
        source = reader(tmp_path, waits=()).open(f"{served.url}/{NAMES}", SPEC)
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        served.fault = lambda name, count: ("status", 502)
        assert run_command(lambda: print(batches(source, workers=1))) == 75
    assert "1 tries failed (502" in capsys.readouterr().err


def test_a_missing_server_and_an_html_page(tmp_path, folder, capsys):
    assert run_command(lambda: print(reader(tmp_path).open("http://127.0.0.1:9/a.tar", SPEC))) == 75
    (folder / "train-000000.tar").write_bytes(b"<!DOCTYPE html><html>" + b" " * 600)
    with serving(folder) as served:
        assert run_command(lambda: print(reader(tmp_path).open(f"{served.url}/{NAMES}", SPEC))) == 2
    assert "train-000000.tar: broken tar: a web page, not the file itself" in capsys.readouterr().err


def test_a_server_is_asked_again_as_late_as_it_says(monkeypatch):
    class Busy(OSError):
        status = 503

        def __init__(self, headers):
            super().__init__("busy")
            self.headers = headers

    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    tries = patience.Patience("u", (1.0, 4.0, 16.0))
    for headers in (
        {"Retry-After": "7"},
        {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"},
        {"Retry-After": "9999"},
    ):
        tries.after(Busy(headers))
    assert slept == [7.0, 4.0, 300.0]
    tries.renew()
    tries.after(Busy({}))
    assert slept[-1] == 1.0


def test_a_later_start_reads_no_shard(tmp_path, folder):
    with serving(folder) as served:
        pattern = f"{served.url}/{NAMES}"
        first = reader(tmp_path).files(pattern, "data.train").summaries
        before = {name: len(gets) for name, gets in served.gets.items()}
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        assert reader(tmp_path).files(pattern, "data.train").summaries == first
        assert {name: len(gets) for name, gets in served.gets.items()} == before
        signed = reader(tmp_path).files(f"{served.url}/{NAMES}?signature=1", "data.train").summaries
        assert [s.sha256 for s in signed] == [s.sha256 for s in first]
        assert {name: len(gets) for name, gets in served.gets.items()} == before


def test_indices_next_to_the_shards_are_taken_and_compared_once_these_are_staged(tmp_path, folder, capsys):
    paths = expand(str(folder / NAMES), "x")
    index([str(folder / NAMES)])
    assert capsys.readouterr().out == f"5 shards, {sum(COUNTS)} samples: indexed\n"
    expected = summarize_all(paths, None)
    with serving(folder) as served:
        source = reader(tmp_path).open(f"{served.url}/{NAMES}", SPEC)
        found = reader(tmp_path).files(f"{served.url}/{NAMES}", "data.train").summaries
        assert [s.count for s in found] == [s.count for s in expected]
        assert not any(name.endswith(".tar") for name in served.gets)
        assert_equal(batches(source), batches(local(tmp_path, folder)))
        again = reader(tmp_path).files(f"{served.url}/{NAMES}", "data.train")
    assert all(summary.sha256 for summary in again.summaries)


def test_an_index_of_another_shard_is_refused_and_one_of_another_size_left_aside(tmp_path, folder):
    first, second = (str(folder / f"train-00000{n}.tar") for n in (0, 1))
    summarize_all([first, second], None)
    shutil.copy(f"{second}.index.npz", f"{first}.index.npz")  # of another size
    with serving(folder) as served:
        assert reader(tmp_path).files(f"{served.url}/train-000000.tar", "x").summaries[0].count == COUNTS[0]
    files = [("a.png", png(3)), ("a.txt", b"x" * 2000)]
    write_tar(folder / "b.tar", files)
    summarize_all([str(folder / "b.tar")], None)
    write_tar(folder / "b.tar", [files[1], files[0]])  # of the same size
    with serving(folder) as served:
        source = reader(tmp_path).open(f"{served.url}/b.tar", SampleSpec(("text",), 8, 5))
        with pytest.raises(
            ValueError, match=r"b.tar.index.npz: the index next to the shard is that of another"
        ):
            source[0]


@pytest.mark.parametrize("etags", [True, False])
def test_a_shard_that_changed_is_noticed(tmp_path, folder, etags):
    with serving(folder, etags=etags) as served:
        pattern = f"{served.url}/{NAMES}"
        source = reader(tmp_path).open(pattern, SPEC)
        path = folder / "train-000001.tar"
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1 3", b"1 X"))
        for staged in (tmp_path / "cache").glob("*.tar"):
            staged.unlink()
        with pytest.raises(ValueError, match=r"train-000001.tar: the shard changed since it was indexed"):
            batches(source)
        if etags:  # another start indexes it anew
            texts = [t for batch in batches(reader(tmp_path).open(pattern, SPEC)) for t in batch["text"]]
            assert "1 X" in texts and "1 3" not in texts


def test_urls_that_are_refused(tmp_path, monkeypatch):
    refused = {
        "pipe:cat a.tar": "would run a program",
        "simplecache::http://127.0.0.1/a.tar": "chains URLs",
        "zip://a.tar::http://127.0.0.1/b.zip": "chains URLs",
        "memory://a.tar": "got memory://, expected s3, gs, hf",
        "reference://a.tar": "got reference://",
        "nonsense://a.tar": "got nonsense://",
    }
    for url, reason in refused.items():
        with pytest.raises(ValueError, match=reason) as error:
            expand(url, "data.train")
        assert str(error.value).startswith("data.train: ")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install 'ldm\[remote\]'"):
        expand("gcs://bucket/a.tar", "data.train")  # of which no test keeps a client
    path = write_tar(tmp_path / "a::b.tar", sample(0))
    assert expand(str(path), "x") == [str(path)]
    path = write_tar(tmp_path / "a.tar", sample(0))
    assert expand(f"file://{path}", "x") == [str(path)]


def test_globs_list_what_a_web_server_lists(tmp_path, folder):
    summarize_all(expand(str(folder / NAMES), "x"), None)
    with serving(folder) as served:
        expected = [f"{served.url}/train-{n:06d}.tar" for n in range(5)]
        assert expand(f"{served.url}/train-*.tar", "x") == expected
        with pytest.raises(FileNotFoundError, match="matches no file"):
            expand(f"{served.url}/val-*.tar", "x")


def test_evaluation_reads_remote_shards_once_each(tmp_path, folder):
    pattern = write_shards(tmp_path / "val", [5, 4], "val")
    expected = Indexed(index_dir=str(tmp_path / "i")).evaluation(pattern, 8)
    with serving(tmp_path / "val") as served:
        found = reader(tmp_path).evaluation(f"{served.url}/val-{{000000..000001}}.tar", 8)
        assert found.fields == expected.fields and found.fingerprint(9) == expected.fingerprint(9)
        assert [found[n]["text"] for n in range(9)] == [expected[n]["text"] for n in range(9)]
        assert load_index(f"{served.url}/val-000001.tar", None, ShardCache(str(tmp_path / "cache"))).key(0)
