"""Rows of shards in their buckets: which samples a global batch can be made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ldm.data.buckets import AspectRatio, Buckets, Size, without_small
from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.filters import Filter
from ldm.data.index import Summary
from ldm.data.kept import check_kept, kept_rows
from ldm.data.manifest import latents_buckets
from ldm.data.rows import Rows

OPTION = "data.buckets"


@dataclass(frozen=True)
class BucketRows:
    """Rows of shards, grouped by the size that they are shown in.

    Args:
        rows: The rows, a group for each size.
        sizes: The sizes.
        notes: What is to be said of them, in lines.
    """

    rows: Rows
    sizes: tuple[Size, ...]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Say how many samples each size has, and what else there is to say."""
        if not isinstance(self.rows.grouping, AspectRatio):
            return self.notes
        counts = zip(self.sizes, self.rows.counts.sum(axis=0).tolist(), strict=True)
        return [
            f"{OPTION}: " + ", ".join(f"{count:,} in {size}" for size, count in counts if count),
            *self.notes,
        ]


@dataclass(frozen=True)
class Shapes:
    """What rows are grouped by.

    Args:
        sizes: Sizes that images are shown in, from the widest to the highest; one alone groups nothing.
        of_latents: Whether the proportions are those of latents, which cannot be shown in another size.
        batch_size: Samples of a global batch.
    """

    sizes: tuple[Size, ...]
    of_latents: bool = False
    batch_size: int = 1

    def rows(
        self,
        summaries: Sequence[Summary],
        index_dir: str | None,
        kept: Filter | None,
        cache: ShardCache = DEFAULT,
    ) -> BucketRows:
        """Group the rows of shards.

        Images of a size that fewer than a global batch have get the nearest of the other sizes.

        Args:
            summaries: The shards.
            index_dir: Folder of their indices; None: that of each shard.
            kept: Filter of the samples; None keeps all.
            cache: Where remote shards are staged.

        Raises:
            ValueError: If the filter keeps nothing, or no sample has a size.
        """
        if len(self.sizes) == 1:
            return BucketRows(kept_rows(summaries, index_dir, kept, cache), self.sizes)
        rows = Rows(summaries, index_dir, AspectRatio(self.sizes, *self._columns, kept), cache=cache)
        if kept is not None:
            check_kept(rows, kept)
        notes = self._about_unknown(rows)
        counts = rows.counts.sum(axis=0).tolist()
        sizes = self.sizes if self.of_latents else without_small(self.sizes, counts, self.batch_size)
        if sizes != self.sizes:
            rows = Rows(summaries, index_dir, AspectRatio(sizes, *self._columns, kept), cache=cache)
        notes += self._about_small(counts)
        return BucketRows(rows.without_empty(), sizes, notes)

    @property
    def _columns(self) -> tuple[str, str]:
        return ("latent_height", "latent_width") if self.of_latents else ("height", "width")

    def _about_unknown(self, rows: Rows) -> list[str]:
        """Say how many samples have no size.

        Raises:
            ValueError: If all have none.
        """
        unknown = max(rows.lacking[column] for column in self._columns)
        if unknown == rows.total:
            raise ValueError(
                f"{OPTION}: none of {unknown:,} samples has a {' and '.join(self._columns)}, e.g. in "
                f"{rows.summaries[0].path}: expected images that can be read, or both in their json"
            )
        return [f"{OPTION}: {unknown:,} samples without a readable size count as square"] if unknown else []

    def _about_small(self, counts: Sequence[int]) -> list[str]:
        """Say what happens to sizes with fewer samples than a global batch."""
        small = [(size, n) for size, n in zip(self.sizes, counts, strict=True) if 0 < n < self.batch_size]
        if not small:
            return []
        names = ", ".join(f"{size} ({count})" for size, count in small[:6])
        fate = "its batches repeat them" if self.of_latents else "they get the nearest other size"
        return [
            f"{OPTION}: sizes with fewer samples than a global batch of {self.batch_size}: {names}; {fate}"
        ]


def shapes_of(
    buckets: Buckets | None,
    fields: Collection[str],
    train: Sequence[str],
    image_size: int,
    batch_size: int,
) -> Shapes | None:
    """Return the sizes of training images: those that latents were encoded in, or else those of ``buckets``.

    Args:
        buckets: ``data.buckets``, or None.
        fields: What is read.
        train: Patterns of the training shards.
        image_size: Side of the square whose pixels are the budget.
        batch_size: Samples of a global batch.

    Returns:
        None if all images are square.

    Raises:
        ValueError: If latents have other sizes, or a field has no size of its own in a bucket.
    """
    of_latents = "latent" in fields
    sizes = tuple(buckets.sizes(image_size)) if buckets else ()
    if of_latents:
        encoded = latents_buckets(train, "data.train")
        if buckets and encoded != sizes:
            raise ValueError(
                f"{OPTION}: the latents of data.train are of {_names(encoded) or 'squares'}, expected "
                f"{_names(sizes)}: leave {OPTION} out, or encode with the same --buckets"
            )
        sizes = encoded
    if not sizes:
        return None
    if "low_res" in fields:
        raise ValueError(
            f"{OPTION}: low-resolution images keep their own size, and make no batch of one shape"
        )
    return Shapes(sizes, of_latents, batch_size)


def _names(sizes: Sequence[Size]) -> str:
    return " ".join(map(str, sizes))
