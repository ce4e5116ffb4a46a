"""Samples that a filter keeps: how many, and why not more."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli import instead
from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.decode import BadSample, Members
from ldm.data.files import ShardFiles
from ldm.data.filters import Filter
from ldm.data.index import Summary
from ldm.data.metadata import COMPUTED, Kind, metadata
from ldm.data.rows import Rows, is_missing


def kept_rows(
    summaries: Sequence[Summary], index_dir: str | None, kept: Filter | None, cache: ShardCache = DEFAULT
) -> Rows:
    """Return the rows of shards that a filter keeps, without the shards of which it keeps none.

    Args:
        summaries: The shards.
        index_dir: Folder of their indices; None: that of each shard.
        kept: The filter; None keeps all.
        cache: Where remote shards are staged.

    Raises:
        ValueError: See ``check_kept``.
    """
    rows = Rows(summaries, index_dir, kept, cache=cache)
    if kept is None:
        return rows
    check_kept(rows, kept)
    return rows.without_empty()


def check_kept(rows: Rows, kept: Filter) -> None:
    """Check that there are rows.

    Args:
        rows: Those that the filter keeps.
        kept: The filter.

    Raises:
        ValueError: If it keeps none, or names a field that no sample has.
    """
    for name, kind in kept.columns.items():
        if rows.lacking[name] == rows.total:
            raise ValueError(f"{kept.option}: {_unknown(rows, name, kind)}")
    if not rows.counts.any():
        raise ValueError(f"{kept.option}: '{kept.identity:.100}' {describe(rows)}, expected at least one")


def describe(rows: Rows) -> str:
    """Say how many samples a filter keeps, and how many lack its fields."""
    lacking = [f"{count:,} lack '{name}'" for name, count in rows.lacking.items() if count]
    found = f"keeps {rows.counts.sum():,} of {rows.total:,} samples"
    return "; ".join([found, *lacking])


def _unknown(rows: Rows, name: str, kind: Kind) -> str:
    """Say what is there instead of a column that no sample has."""
    other: Kind = float if kind is str else str
    words = {float: "a number", str: "text"}
    for summary in rows.summaries:
        values = metadata(summary, rows.index_dir, {name: other}, rows.cache)[name]
        for value in values[~is_missing(values)].tolist():
            return f"'{name}' is used as {words[kind]}, but is {words[other]}, e.g. {value!r:.40}"
    known = [*_keys(rows), *COMPUTED]
    hint = instead(name, known)
    return f"no sample has '{name}'{hint}: the first has {', '.join(known)}"


def _keys(rows: Rows) -> list[str]:
    """List the keys of the first shard's first json member that a filter may name."""
    try:
        files = ShardFiles(rows.summaries[:1], rows.index_dir, rows.cache)
        found = Members(*files.members(0, 0, ("json",))).json()
    except BadSample:
        return []
    return [key for key, value in found.items() if isinstance(value, str | int | float)]
