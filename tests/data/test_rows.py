"""Rows in groups: counted before anything is read, and each found once."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import write_tar

from ldm.data import rows as module
from ldm.data.index import summarize_all
from ldm.data.rows import Rows

VALUES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8], [7, 7]]


@dataclass(frozen=True)
class Remainder:
    """Groups numbers by their remainder; those above ``limit`` are left out."""

    num_groups: int = 3
    limit: int = 6
    columns: Mapping[str, type] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", {"x": float})

    @property
    def identity(self) -> str:
        return f"{self.num_groups} {self.limit}"

    def groups(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        x = columns["x"]
        return np.where(x <= self.limit, np.nan_to_num(x) % self.num_groups, -1).astype(int)


def write(folder: Path, values: list[list[int]]) -> list[str]:
    paths = []
    for shard, of_shard in enumerate(values):
        files = [(f"{shard}-{n}.json", json.dumps({"x": x}).encode()) for n, x in enumerate(of_shard)]
        paths.append(str(write_tar(folder / f"{shard}.tar", files)))
    return paths


@pytest.fixture
def summaries(tmp_path):
    return summarize_all(write(tmp_path, VALUES), None)


def all_rows(rows: Rows, shard: int) -> list[list[int]]:
    return [[rows.row(shard, g, k) for k in range(n)] for g, n in enumerate(rows.counts[shard])]


def expected(shard: int, grouping: Remainder) -> list[list[int]]:
    kept = [(n, x) for n, x in enumerate(VALUES[shard]) if x <= grouping.limit]
    return [[n for n, x in kept if x % grouping.num_groups == g] for g in range(grouping.num_groups)]


@pytest.mark.parametrize("grouping", [Remainder(), Remainder(1), Remainder(2, 3)])
def test_each_row_is_found_once_in_its_group(summaries, grouping):
    rows = pickle.loads(pickle.dumps(Rows(summaries, None, grouping)))
    assert rows.counts.shape == (4, grouping.num_groups) and rows.counts.dtype == np.int64
    for shard in (2, 0, 3, 1, 2):
        assert all_rows(rows, shard) == expected(shard, grouping)


def test_without_groups_all_rows_are_used(summaries, tmp_path):
    rows = Rows(summaries, None)
    assert rows.counts.tolist() == [[5], [1], [6], [2]] and rows.lacking == {}
    assert [rows.row(2, 0, k) for k in range(6)] == [0, 1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*metadata*"))


def test_shards_that_give_nothing_can_be_left_out(summaries):
    rows = Rows(summaries, None, Remainder()).without_empty()
    assert [Path(summary.path).name for summary in rows.summaries] == ["0.tar", "2.tar"]
    assert all_rows(rows, 1) == expected(2, Remainder())


def test_counts_are_kept_until_shards_or_grouping_change(summaries, tmp_path, monkeypatch):
    first = Rows(summaries, None, Remainder())
    read: list[str] = []
    of = module.metadata
    monkeypatch.setattr(module, "metadata", lambda *a: read.append(a[0].path) or of(*a))
    assert np.array_equal(Rows(summaries, None, Remainder()).counts, first.counts)
    assert not read
    assert Rows(summaries, None, Remainder(limit=9)).counts.sum() == 14
    assert len(read) == 4
    write(tmp_path, [[1], *VALUES[1:]])
    changed = summarize_all([summary.path for summary in summaries], None)
    assert Rows(changed, None, Remainder()).counts[0].tolist() == [0, 1, 0]
    for table in tmp_path.glob(".shards-*-rows-*.npz"):
        table.write_bytes(b"damaged")
    assert Rows(changed, None, Remainder()).counts[0].tolist() == [0, 1, 0]


def test_samples_without_a_column_are_counted(tmp_path):
    paths = write(tmp_path, VALUES[:1])
    paths.append(str(write_tar(tmp_path / "b.tar", [("0.json", b"{}"), ("1.txt", b"word")])))
    rows = Rows(summarize_all(paths, None), None, Remainder())
    assert rows.lacking == {"x": 2} and rows.counts[1].tolist() == [0, 0, 0]


def test_few_shards_stay_in_memory(summaries, monkeypatch):
    monkeypatch.setattr(module, "_KEEP", 2)
    rows = Rows(summaries, None, Remainder())
    for shard in (0, 1, 2, 0, 3, 1, 0):
        assert all_rows(rows, shard) == expected(shard, Remainder())
        assert len(rows._rows) <= 2
