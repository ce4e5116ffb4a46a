"""Captions that an evaluation cuts off are counted, by who reads them."""

import pytest

from ldm.distributed.group import SingleProcess
from ldm.evaluation.captions import TruncatedCaptions
from ldm.nets.text import num_tokens

BATCHES = [
    {"key": ["a", "b", "c"], "text": ["one two three", "one", "one two"]},
    {"key": ["d"], "text": ["one"]},
]


def test_the_share_of_captions_that_are_cut_is_of_all_of_them():
    assert [num_tokens(text) for text in BATCHES[0]["text"]] == [5, 3, 4]
    captions = TruncatedCaptions({"the model": 4, "the extractor clip": 3})
    for batch in BATCHES:
        captions.add(batch)
    found = captions.metadata(SingleProcess())
    assert found == {"truncated_captions@4": 0.25, "truncated_captions@3": 0.5}
    said = "captions are cut off: 25% to the 4 tokens of the model, 50% to the 3 tokens of the extractor clip"
    assert captions.warning() == said


@pytest.mark.parametrize("readers", [{}, {"the model": 5}])
def test_nothing_is_said_where_nothing_is_cut(readers):
    captions = TruncatedCaptions(readers)
    captions.add(BATCHES[0])
    captions.add({"key": ["without"]})
    assert captions.metadata(SingleProcess()) == {f"truncated_captions@{n}": 0.0 for n in readers.values()}
    assert captions.warning() is None
