"""A fixture that writes tiny shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_shards import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Write shards of given counts into a folder of this test."""
    return lambda counts, name="train", first=0: write_shards(tmp_path / "shards", counts, name, first)
