"""The endless sequence of shards that Streaming reads."""

from itertools import islice

import pytest

from ldm.data import streaming
from ldm.data.order import permutation
from ldm.data.source import DataRank, SampleSpec


def _turns(num, first, seed=3):
    source = streaming.StreamingSource([f"{n}.tar" for n in range(num)], SampleSpec(("image",), 8, seed), 1)
    return streaming._Stream(source, DataRank(0, 1))._turns(first)


@pytest.mark.parametrize("first", [0, 3, 7, 8, 23])
def test_each_epoch_is_a_permutation_of_its_own_from_any_turn_on(first):
    for turn, found in enumerate(islice(_turns(8, first), 30), first):
        epoch, within = divmod(turn, 8)
        assert found == {"url": f"{permutation(8, 3, epoch)[within]}.tar", "turn": turn}


def test_an_epoch_is_permuted_once(monkeypatch):
    epochs = []
    monkeypatch.setattr(streaming, "permutation", lambda n, *key: epochs.append(key) or permutation(n, *key))
    list(islice(_turns(1000, 500), 2000))
    assert epochs == [(3, 0), (3, 1), (3, 2)]
