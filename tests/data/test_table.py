"""The table of shards equals their indices, so that other processes need not open them."""

import multiprocessing
import os
from pathlib import Path

import pytest
from tiny_shards import sample, write_tar
from torch import distributed

from ldm.data import table
from ldm.data.index import sidecar, summarize_all
from ldm.data.table import read, summarize_shared, table_path, write


@pytest.fixture
def shards(tmp_path):
    paths = [str(tmp_path / f"{i}.tar") for i in range(3)]
    for i, path in enumerate(paths):
        write_tar(Path(path), [file for number in range(i + 2) for file in sample(number)])
    return paths


def test_a_table_equals_the_indices(shards, tmp_path):
    summaries = summarize_all(shards, None)
    where = table_path(shards, None)
    write(where, summaries)
    assert read(where, shards) == summaries
    assert where.parent == tmp_path and table_path(shards[:2], None) != where
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_table_that_is_not_of_these_shards_is_none(shards, tmp_path):
    where = tmp_path / "table.npz"
    assert read(where, shards) is None
    write(where, summarize_all(shards[:2], None))
    assert read(where, shards) is None
    where.write_bytes(b"half")
    assert read(where, shards) is None


def test_where_a_table_cannot_be_written_there_is_none(shards, tmp_path):
    (tmp_path / "file").write_text("")
    write(tmp_path / "file" / "table.npz", summarize_all(shards, None))  # silently


def follow(rank, store, paths, queue):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 0:
        found = summarize_shared(paths, None)
        for path in paths:
            os.unlink(sidecar(path, None))  # the other must not need them
        distributed.barrier()
    else:
        distributed.barrier()
        found = summarize_shared(paths, None)
        assert not any(os.path.exists(sidecar(path, None)) for path in paths)
    queue.put((rank, found))


def test_one_process_looks_at_the_indices_and_the_others_at_its_table(shards, tmp_path):
    expected = summarize_all(shards, None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=follow, args=(rank, tmp_path / "store", shards, queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert found == {0: expected, 1: expected}


def test_a_single_process_writes_no_table(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "write", lambda *_: pytest.fail("nobody would read it"))
    assert summarize_shared(shards, None) == summarize_all(shards, None)
