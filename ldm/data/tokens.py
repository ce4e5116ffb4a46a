"""Token ids of captions, made by the workers of the loader: what trains has no time for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from ldm.data.fields import Sample
from ldm.stage_protocols import Tokenizes
from ldm.types import Batch, Caption


def with_token_ids(loader: DataLoader[Sample], module: object) -> DataLoader[Sample]:
    """Let the workers of a loader, if it has some, tokenise the captions that a stage reads.

    Args:
        loader: The loader; changed.
        module: What it loads for; one that is no ``Tokenizes`` gets text as it is.
    """
    tokenizer = module.tokenizer if isinstance(module, Tokenizes) else None
    if loader.num_workers and tokenizer is not None:
        loader.collate_fn = partial(_collate, loader.collate_fn, tokenizer)
    return loader


def _collate(
    collate: Callable[[Any], Any], tokenizer: Callable[[str], Sequence[int]], samples: list[Sample]
) -> Batch:
    batch: Batch = collate(samples)
    if "text" in batch:
        batch["text"] = [Caption(text, tokenizer(text)) for text in batch["text"]]
    return batch
