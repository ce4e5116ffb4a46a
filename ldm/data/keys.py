"""Keys that are equal: in two forms of Unicode, or in several shards, where they would draw equal noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from unicodedata import normalize

import numpy as np

from ldm.data.order import hashed

T = TypeVar("T")


def join_twins(rows: dict[str, dict[str, T]]) -> None:
    """Join samples whose keys differ in their Unicode form alone, as files of a Mac and of Linux do.

    Args:
        rows: Key to the members of a sample, by their endings; those that share one are no twins.
    """
    first: dict[str, str] = {}
    for key in [key for key in rows if not key.isascii()]:
        twin = first.setdefault(normalize("NFC", key), key)
        if twin != key and rows[twin].keys().isdisjoint(rows[key]):
            rows[twin] |= rows.pop(key)


def overlapping(spans: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Group shards whose spans of keys overlap: only those can have equal keys, and only theirs are read.

    Args:
        spans: Least and greatest key of each shard.

    Returns:
        Groups of at least two shards by their numbers, in order.
    """
    groups: list[list[int]] = []
    end = ""
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        least, greatest = spans[number]
        if not groups or least > end:
            groups.append([])
        groups[-1].append(number)
        end = max(end, greatest)
    return [sorted(group) for group in groups if len(group) > 1]


def repeating(keys: Sequence[np.ndarray]) -> set[int]:
    """Return the numbers of shards with a key that one before them has: by hashes, 8 bytes a key.

    Among 10^8 keys the chance that two have one hash by accident is 0.03 %; the keys of their shards would
    then be told apart although they differ anyway.

    Args:
        keys: (N,) UTF-8 bytes of each shard.
    """
    hashes = np.concatenate([_hashes(of_shard) for of_shard in keys])
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    ends = np.cumsum([len(of_shard) for of_shard in keys])
    return set(np.searchsorted(ends, again, side="right").tolist())


def _hashes(keys: np.ndarray) -> np.ndarray:
    words = keys.astype(f"S{-(-keys.itemsize // 8) * 8}").view(np.uint64).reshape(len(keys), -1)
    state = np.zeros(len(keys), np.uint64)
    for word in words.T:
        state = np.where(word != 0, hashed(state ^ word), state)  # zeros pad the shorter keys
    return state
