"""Equal keys in several shards are made distinct, and unique ones stay as they are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from tiny_shards import sample, write_shards, write_tar

from ldm.data.keys import repeating
from ldm.data.module import Indexed
from ldm.data.source import DataRank, SampleSpec
from ldm.rng import SampleNoise


def test_equal_keys_of_two_shards_have_their_own_random_numbers(tmp_path):
    """Numbering that starts anew in each shard: 20 of 40 images were distinct."""
    for shard in range(2):
        write_shards(tmp_path / str(shard), [20], "val")
    pattern = str(tmp_path / "{0,1}/val-000000.tar")
    with pytest.warns(UserWarning, match=r"data.val: 1 of 2 shards have keys of others, e.g. .*1/val-000000"):
        samples = Indexed().evaluation(pattern, 8)
    keys = [key for batch in samples.loader(8, 0, DataRank(0, 1)) for key in batch["key"]]
    assert keys == [f"{n:06d}" for n in range(20)] + [f"{n:06d}@1" for n in range(20)]
    noise = SampleNoise(0, keys).like(torch.empty(40, 4))
    assert len(noise.unique(dim=0)) == 40
    source = Indexed().open(pattern, SampleSpec(("image", "text"), 8, 0))
    assert {source[n]["key"] for n in range(40)} == set(keys)


def test_unique_keys_stay_as_they_are_in_whatever_order(tmp_path):
    numbers = [[0, 4, 2], [1, 3], [9, 8]]
    for shard, of_shard in enumerate(numbers):
        write_tar(tmp_path / f"{shard}.tar", [file for number in of_shard for file in sample(number)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = Indexed().evaluation(str(tmp_path / "*.tar"), 8)
    assert [samples[n]["key"] for n in range(7)] == [f"{n:06d}" for of_shard in numbers for n in of_shard]


def test_keys_of_other_widths_have_one_hash():
    short, long = np.array([b"a", b"bb"]), np.array([b"a", b"b" * 40])
    assert repeating([short, long]) == {1}
    assert repeating([short[1:], long]) == set()
