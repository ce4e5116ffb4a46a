"""Search for bad samples before the first step: what headers of images and captions tell, all at once.

What only decoding tells is counted while training reads it, see ``ldm.data.bad_samples``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ldm.data.bad_samples import BadSamplePolicy, Tally, TooManyBad
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.metadata import Problem, metadata
from ldm.data.own_members import OwnMembers
from ldm.data.readers import IndexedSource
from ldm.data.remote import is_remote
from ldm.data.rows import Rows
from ldm.data.source import Source

NUM_SEARCHED = 100_000
"""Training samples that are searched, and validation samples, rounded up to whole shards."""
_TRAINING = {"image": "image problem", "text": "drawn caption problem"}
_VALIDATION = {"image": "image problem", "text": "caption problem"}
"""Field to the column that says why it cannot be read."""
_SHOWN = 3
"""Keys that are printed."""


@dataclass(frozen=True)
class Search:
    """Bad samples that were found before the first step.

    Args:
        kind: "training" or "validation".
        searched: Samples that were looked at.
        total: Samples that there are.
        found: The bad ones among those, in the order of the shards: their shard, and what is wrong.
    """

    kind: str
    searched: int
    total: int
    found: Sequence[tuple[str, Problem]]

    @property
    def reasons(self) -> dict[str, int]:
        """How many there are by reason, most first."""
        return dict(Counter(problem.reason for _, problem in self.found).most_common())

    @property
    def lines(self) -> list[str]:
        """Kind, reason and message of each, with tabs between them."""
        reasons = (problem.reason for _, problem in self.found)
        return [f"{self.kind}\t{each}\t{text}" for each, text in zip(reasons, self.messages, strict=True)]

    @property
    def messages(self) -> list[str]:
        """What is wrong with each, with shard and key."""
        return [f"{shard}: {problem.message}" for shard, problem in self.found]

    def __str__(self) -> str:
        """Count them by reason, and name the first."""
        of = f" (of {self.total:,})" if self.searched < self.total else ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        keys = ", ".join(f"'{problem.key:.40}'" for _, problem in self.found[:_SHOWN])
        bad = f"{len(self.found):,} of {self.searched:,}"
        return f"{bad} {self.kind} samples{of} are bad: {reasons}, e.g. {keys}"


def search_training(source: Source, num: int = NUM_SEARCHED) -> Search:
    """Search the sets of training shards, each to an equal part of ``num``; none of another reader.

    Captions that a set or ``data.augment.captions`` gives are left to training.
    """
    found: list[Search] = []
    if isinstance(source, IndexedSource):
        sets = [source.sets[name] for name in source.mixture.phases[-1].shares]
        for each in sets:
            has_own = isinstance(each.files, OwnMembers) and each.files.has_captions
            left = {"text"} if has_own or source.spec.augment.captions else set[str]()
            columns = _columns(_TRAINING, {*source.spec.fields} - left)
            found.append(_search("training", each.samples.rows, columns, -(-num // len(sets))))
    searched, total = sum(each.searched for each in found), sum(each.total for each in found)
    return Search("training", searched, total, [bad for each in found for bad in each.found])


def search_validation(evaluation: EvaluationSet, num: int = NUM_SEARCHED) -> Search:
    """Search the validation shards."""
    return _search("validation", evaluation.rows, _columns(_VALIDATION, evaluation.required), num)


def check(searches: Sequence[Search], policy: BadSamplePolicy, listed: str) -> None:
    """Check what was found by the policy.

    Args:
        searches: What was found.
        policy: What becomes of bad samples.
        listed: The file that lists all, for the message.

    Raises:
        TooManyBad: If the policy does not allow as many.
    """
    total = sum(len(each.found) for each in searches)
    for each in searches:
        try:
            Tally(policy, "data.bad_samples").count(each.searched, each.messages)
        except TooManyBad as error:
            raise TooManyBad(f"{error!s:.190}; before the first step: {total:,}, all in {listed}") from None


def _columns(columns: Mapping[str, str], fields: Collection[str]) -> list[str]:
    return [column for field, column in columns.items() if field in fields]


def _search(kind: str, rows: Rows, columns: Sequence[str], num: int) -> Search:
    """Search the first ``num`` rows that are used, of local shards: remote ones are not fetched for it."""
    counts = rows.counts.sum(axis=1)
    local = [n for n, shard in enumerate(rows.summaries) if columns and not is_remote(shard.path)]
    begins = np.cumsum(counts[local]) - counts[local]
    shards = [shard for shard, begin in zip(local, begins, strict=True) if begin < num]
    found: list[tuple[str, Problem]] = []
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        jobs = pool.map(lambda shard: _problems(rows, shard, columns), shards)
        bar = tqdm(jobs, total=len(shards), desc="search bad samples", unit=" shards", delay=1.0, leave=False)
        for shard, problems in zip(shards, bar, strict=True):
            used = set(rows.used(shard).tolist()) if problems else set[int]()
            path = rows.summaries[shard].path
            found += [(path, problem) for row, problem in problems.items() if row in used]
    return Search(kind, int(counts[shards].sum()), int(counts.sum()), found)


def _problems(rows: Rows, shard: int, columns: Sequence[str]) -> dict[int, Problem]:
    """Return what is wrong with the samples of a shard: row to the first problem."""
    found = metadata(rows.summaries[shard], rows.index_dir, dict.fromkeys(columns, str), rows.cache)
    texts = np.stack([found[column] for column in columns])
    bad = np.flatnonzero((texts != "").any(axis=0)).tolist()
    return {row: Problem.from_text(next(filter(None, texts[:, row]))) for row in bad}
