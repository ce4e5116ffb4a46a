"""A look at all samples of shards, or at some of them, on all cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.data.files import ShardFiles
from ldm.data.index import load_index, summarize, summarize_all
from ldm.data.order import permutation
from ldm.data.sidecar import Summary
from ldm.inspection.look import Look, Samples
from ldm.types import RGB8, ImageKind

EXAMPLES = 5
"""Messages that are kept of each reason, and groups of samples that are equal."""


@dataclass
class Groups:
    """Samples by a value that should be unique."""

    first: dict[object, str] = field(default_factory=dict)
    others: dict[object, list[str]] = field(default_factory=dict)

    def add(self, value: object, name: str) -> None:
        """Note a sample."""
        if value in self.first:
            self.others.setdefault(value, []).append(name)
        else:
            self.first[value] = name

    @property
    def count(self) -> int:
        """Samples whose value one before them has."""
        return sum(map(len, self.others.values()))

    def examples(self) -> list[list[str]]:
        """Return some groups, the largest first."""
        largest = sorted(self.others, key=lambda value: -len(self.others[value]))[:EXAMPLES]
        return [[self.first[value], *self.others[value][: EXAMPLES - 1]] for value in largest]


@dataclass
class Survey:
    """What was found.

    Args:
        summaries: Shards that are intact, empty ones too.
        broken: Path and reason of shards that are not.
        num_looked: Samples that were looked at.
        looks: Those without what is counted below: kept for the contact sheet.
    """

    summaries: list[Summary]
    broken: list[tuple[str, str]]
    num_looked: int = 0
    looks: list[Look] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    num_bad: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    channels: Counter[tuple[int, int]] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    captions: set[int] = field(default_factory=set)
    labels: Counter[int] = field(default_factory=Counter)
    keys: Groups = field(default_factory=Groups)
    images: Groups = field(default_factory=Groups)
    alike: Groups = field(default_factory=Groups)

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(summary.count for summary in self.summaries)

    def add(self, look: Look) -> None:
        """Count a sample."""
        self.num_looked += 1
        self.fields.update(look.fields)
        for reason, message in look.bad:
            self.num_bad[reason] += 1
            if len(found := self.bad.setdefault(reason, [])) < EXAMPLES:
                found.append(message)
        if look.caption is not None:
            self.characters.append(len(look.caption))
            self.tokens.append(look.tokens)
            self.captions.add(hash(look.caption))
        if look.label is not None:
            self.labels[look.label] += 1
        self._add_picture(look)

    def _add_picture(self, look: Look) -> None:
        if (picture := look.picture) is None:
            return
        self.sizes[picture.width, picture.height] += 1
        self.kinds[picture.format, picture.mode, picture.bits] += 1
        self.channels[picture.channels, picture.bits] += 1
        name = f"{look.key} of {look.shard}"
        if picture.digest in self.images.first:
            self.images.add(picture.digest, name)
        else:  # equal ones look alike, too
            self.images.add(picture.digest, name)
            if picture.average is not None:
                self.alike.add(picture.average, name)
        if picture.thumbnail:
            self.looks.append(look)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is broken."""
        return not self.broken and not self.num_bad and not any(summary.lost for summary in self.summaries)


def survey(
    paths: Sequence[str],
    index_dir: str | None,
    num_samples: int | None,
    seed: int,
    num_shown: int,
    count_tokens: Callable[[Sequence[str]], list[int]],
    workers: int,
    kind: ImageKind = RGB8,
) -> Survey:
    """Look at shards.

    Args:
        paths: The shards.
        index_dir: Folder of their indices; None: that of each shard, or a cache where it is read-only.
        num_samples: Samples to look at, drawn by the seed; None looks at all.
        seed: Seed of the draw.
        num_shown: Samples that keep a thumbnail, evenly over those.
        count_tokens: Counts the tokens of captions.
        workers: Processes that read and decode; 1 does it in this one.
        kind: Kind that images are decoded as.
    """
    good, broken = _sorted(paths, index_dir)
    found = Survey(summarize_all(good, index_dir), broken)
    chosen = range(found.num_samples)
    numbers = (
        list(chosen) if num_samples is None else sorted(permutation(len(chosen), seed)[:num_samples].tolist())
    )
    shown = numbers[:: max(1, -(-len(numbers) // num_shown))] if num_shown else []
    samples = Samples(ShardFiles(found.summaries, index_dir), count_tokens, shown, kind)
    with tqdm(total=len(numbers), unit=" samples", desc="inspect", delay=1.0, leave=False) as bar:
        for look in _looks(samples, numbers, workers):
            found.add(look)
            bar.update()
    _count_keys(found, index_dir)
    return found


def _sorted(paths: Sequence[str], index_dir: str | None) -> tuple[list[str], list[tuple[str, str]]]:
    """Tell intact shards from broken ones."""
    good, broken = [], []
    for path in tqdm(paths, unit=" shards", desc="index", delay=1.0, leave=False):
        try:
            summarize(path, index_dir)
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            broken.append((path, str(error).removeprefix(f"{path}: ")))
        else:
            good.append(path)
    return good, broken


def _looks(samples: Samples, numbers: Sequence[int], workers: int) -> Iterator[Look]:
    loader = DataLoader(
        samples,
        batch_size=16,
        sampler=numbers,
        num_workers=0 if workers == 1 or len(numbers) <= 16 else workers,
        collate_fn=list,
    )
    for batch in loader if numbers else ():
        yield from batch


def _count_keys(found: Survey, index_dir: str | None) -> None:
    """Find keys that several shards have; within one a key is a sample."""
    if not any(summary.has_repeated_keys for summary in found.summaries):
        return
    keys = [load_index(summary.path, index_dir).keys for summary in found.summaries]
    values, counts = np.unique(np.concatenate([each for each in keys if len(each)]), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    for summary, of_shard in zip(found.summaries, keys, strict=True):
        for key in of_shard.tolist():
            if key in repeated:
                found.keys.add(key, f"{key.decode()} of {summary.path}")
