"""Captions to the text embeddings that are stored beside latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Protocol

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class EncodesText(Protocol):
    """A text encoder."""

    def encode(self, text: list[str]) -> list[Tensor]:
        """Map B captions to tokens (n, D) each."""
        ...


def embeddings(encoder: EncodesText, captions: Sequence[Sequence[str]], size: int) -> Iterator[Tensor]:
    """Encode the captions of samples, ``size`` at once.

    Yields:
        For each sample (captions, n, D) float16; shorter captions are filled up with NaN.

    Raises:
        ValueError: If a token overflows float16.
    """
    texts = list(chain.from_iterable(captions))
    tokens = chain.from_iterable(encoder.encode(texts[i : i + size]) for i in range(0, len(texts), size))
    for of_sample in captions:
        rows = [each.half() for each in islice(tokens, len(of_sample))]
        for text, row in zip(of_sample, rows, strict=True):
            if not row.isfinite().all():
                raise ValueError(
                    f"--text: the tokens of '{text:.60}' overflow float16, in which they are stored: "
                    "expected --text-layer last, or training without stored ones"
                )
        yield pad_sequence(rows, batch_first=True, padding_value=math.nan)
