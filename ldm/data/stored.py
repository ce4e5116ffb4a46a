"""Fields that the samples of shards have, by their members: known before any is decoded."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.data.decode import BadSample, Members
from ldm.data.fields import FIELDS
from ldm.data.files import ShardFiles, warn_once
from ldm.data.shard_file import peeking


def num_giving(files: ShardFiles, shard: int, field: str) -> int:
    """Count the samples of a shard that have a member for a field.

    A json member counts if that of one of the first ten samples gives the field.
    """
    summary = files.summaries[shard]
    count = sum(summary.present[name] for name in FIELDS[field].members if name != "json")
    if count < summary.count and FIELDS[field].json_keys and _in_json(files, shard, field):
        count += summary.present["json"]
    return min(count, summary.count)


def _in_json(files: ShardFiles, shard: int, field: str) -> bool:
    summary = files.summaries[shard]
    if not summary.present["json"]:
        return False
    for row in range(min(10, summary.count)):
        try:
            with peeking():
                meta = Members(*files.members(shard, row, ("json",))).json()
        except BadSample:
            continue
        if not meta.keys().isdisjoint(FIELDS[field].json_keys):
            return True
    return False


def check_flipped(files: ShardFiles, fields: Sequence[str], flip: float) -> None:
    """Check that all samples have the flipped ones of values that cannot be flipped themselves.

    Raises:
        ValueError: If some are to be flipped and one lacks its flipped value.
    """
    for name in [FIELDS[field].flipped for field in fields if flip]:
        for summary in files.summaries if name else ():
            if lacking := summary.count - summary.present[name or ""]:
                raise ValueError(
                    f"data.augment.flip: got {flip}, but {lacking} of {summary.count} samples of "
                    f"{summary.path} have no {name}: encode them with ldm.encode --flip, or leave flip at 0"
                )


def check_fields(files: ShardFiles, fields: Sequence[str], option: str) -> None:
    """Warn of samples that lack one of ``fields``, which others replace.

    Raises:
        ValueError: If all samples of a shard lack one; it names ``option``.
    """
    with peeking():
        _check_fields(files, fields, option)


def _check_fields(files: ShardFiles, fields: Sequence[str], option: str) -> None:
    given = [{field: num_giving(files, n, field) for field in fields} for n in range(len(files.summaries))]
    for shard, summary in enumerate(files.summaries):
        if lacking := [field for field in fields if not given[shard][field]]:
            has = ", ".join(f"{name} ({count})" for name, count in summary.present.items() if count)
            about = f"the shard {summary.path} has {summary.count} samples with members {has}"
            raise ValueError(
                f"{option}: asks for {lacking}, but {about}; the first is '{files.key(shard, 0)}'"
            )
    for field in fields:
        lacking_of = [summary.count - given[n][field] for n, summary in enumerate(files.summaries)]
        if total := sum(lacking_of):
            shard = next(n for n, count in enumerate(lacking_of) if count)
            example, path = files.lacking(shard, FIELDS[field].members), files.summaries[shard].path
            of = sum(summary.count for summary in files.summaries)
            warn_once(
                f"{option}: {total} of {of} samples lack '{field}', e.g. '{example}' of {path}: others take "
                "their places"
            )
