"""Fields that the samples of shards have, by their members: known before any is decoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ldm.data.decode import BadSample, Members
from ldm.data.fields import FIELDS
from ldm.data.files import ShardFiles, warn_once
from ldm.data.rows import Rows
from ldm.data.shard_file import peeking

Keys = Mapping[str, Collection[str]]
"""Field to keys of the json member that give it in addition to those of the table."""
_NONE: Keys = {}


def num_giving(files: ShardFiles, shard: int, field: str, more: Keys = _NONE) -> int:
    """Count the samples of a shard that have a member for a field.

    A json member counts if that of one of the first ten samples gives the field.
    """
    summary = files.summaries[shard]
    count = sum(summary.present[name] for name in FIELDS[field].members if name != "json")
    if count < summary.count and FIELDS[field].json_keys and _in_json(files, shard, field, more):
        count += summary.present["json"]
    return min(count, summary.count)


def _in_json(files: ShardFiles, shard: int, field: str, more: Keys) -> bool:
    summary, keys = files.summaries[shard], {*FIELDS[field].json_keys, *more.get(field, ())}
    if not summary.present["json"]:
        return False
    for row in range(min(10, summary.count)):
        try:
            with peeking():
                meta = Members(*files.members(shard, row, ("json",))).json()
        except BadSample:
            continue
        if not keys.isdisjoint(meta):
            return True
    return False


def check_captions(fields: Sequence[str], options: Mapping[str, object]) -> None:
    """Check that stored text embeddings are of the captions that training is to read.

    Args:
        fields: Names of fields.
        options: Option to its value, each of which asks for other captions; None for one that does not.

    Raises:
        ValueError: If they are not.
    """
    for option, value in options.items() if "text_embedding" in fields else ():
        if value is not None:
            raise ValueError(
                f"{option}: got {value!r:.60}, but the text embeddings that ldm.encode --text stored are of "
                "other captions, expected none, or data.fields: [latent, text] to encode captions in training"
            )


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


def check_fields(
    files: ShardFiles, fields: Sequence[str], option: str, rows: Rows | None = None, more: Keys = _NONE
) -> None:
    """Warn of samples that lack one of ``fields``, which others replace.

    Args:
        files: The shards.
        fields: Names of fields.
        option: What asks for them, for messages.
        rows: Rows that are used; None: all.
        more: Further keys of the json member that give fields.

    Raises:
        ValueError: If all samples of a shard lack one; it names ``option``.
    """
    used = rows or Rows(files.summaries, files.index_dir, cache=files.cache)
    with peeking():
        _check_fields(files, fields, option, used, more)


def _num_lacking(files: ShardFiles, shard: int, field: str, given: int, rows: Rows, more: Keys) -> int:
    """Count the used samples of a shard that have no member for a field; ``given`` of all have one."""
    summary = files.summaries[shard]
    if given == summary.count or rows.grouping is None:
        return summary.count - given
    names = [name for name in FIELDS[field].members if summary.present[name] and name != "json"]
    if summary.present["json"] and _in_json(files, shard, field, more):
        names.append("json")
    return int((~files.having(shard, names)[rows.used(shard)]).sum())


def _check_fields(files: ShardFiles, fields: Sequence[str], option: str, rows: Rows, more: Keys) -> None:
    numbers = range(len(files.summaries))
    given = [{field: num_giving(files, n, field, more) for field in fields} for n in numbers]
    for shard, summary in enumerate(files.summaries):
        if lacking := [field for field in fields if not given[shard][field]]:
            has = ", ".join(f"{name} ({count})" for name, count in summary.present.items() if count)
            about = f"the shard {summary.path} has {summary.count} samples with members {has}"
            raise ValueError(
                f"{option}: asks for {lacking}, but {about}; the first is '{files.key(shard, 0)}'"
            )
    for field in fields:
        lacking_of = [_num_lacking(files, n, field, given[n][field], rows, more) for n in numbers]
        if total := sum(lacking_of):
            shard = next(n for n, count in enumerate(lacking_of) if count)
            example, path = files.lacking(shard, FIELDS[field].members), files.summaries[shard].path
            warn_once(
                f"{option}: {total} of {rows.counts.sum()} samples lack '{field}', e.g. '{example}' of {path}"
                ": others take their places"
            )
