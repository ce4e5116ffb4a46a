"""A line at the start of a run on how long the captions are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from ldm.data.module import Shards
from ldm.data.shard_file import peeking
from ldm.stage_protocols import ReadsCaptions


class CaptionLengths(L.Callback):
    """Prints before the first step how many tokens captions have, and which share of them is cut off.

    It looks at the first training samples, as far as two seconds reach. Nothing is printed for a stage
    without captions, nor for the ``Streaming`` reader.

    Args:
        num: Most captions that are looked at; 0 looks at none.
    """

    def __init__(self, num: int = 1000) -> None:
        self.num = num

    @override
    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if (
            not isinstance(data, Shards)
            or not isinstance(pl_module, ReadsCaptions)
            or "text" not in data.fields
        ):
            return
        limit = pl_module.context_length
        with peeking():
            captions = [] if limit is None else data.source.captions(self.num, seconds=2.0)
        if limit is not None and captions:
            print(lengths(pl_module.count_tokens(captions), limit), flush=True)


def lengths(counts: Sequence[int], limit: int) -> str:
    """Describe the tokens of captions, begin and end marks included, beside the most that are read."""
    cut = sum(count > limit for count in counts) / len(counts)
    return (
        f"captions: {median(counts):.0f} tokens at the median, {max(counts)} at most, of {len(counts):,}; "
        f"{cut:.1%} are cut to the {limit} that are read"
    )
