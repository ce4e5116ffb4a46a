"""Captions that workers of the loader tokenise: ids of the stage's tokenizer, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from tiny_shards import write_shards

from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.tokens import with_token_ids
from ldm.nets import text
from ldm.nets.clip import CLIPModel
from ldm.nets.text import TextTower, caption_ids, num_chunks, tokenize, truncated
from ldm.optim.recipes import AdamW
from ldm.rng import SampleNoise
from ldm.stages.clip import CLIP
from ldm.types import Caption

LONG = "a small red ring above a large blue square on a white background"


def clip() -> CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    return CLIP(CLIPModel(8, vision, {"context_length": 6, "width": 16, "heads": 2, "layers": 1}), AdamW())


@pytest.fixture
def refused(monkeypatch):
    """From now on this process has no tokenizer."""

    def refuse(*args):
        raise AssertionError("tokenised once more")

    def begin():
        monkeypatch.setattr(text, "_remembered_ids", refuse)
        monkeypatch.setattr(text, "byte_pairs", refuse)

    return begin


@pytest.mark.parametrize("reader", [Indexed(), Streaming(shuffle_buffer=2)])
def test_workers_give_captions_the_ids_of_the_stage(tmp_path, reader):
    shards = write_shards(tmp_path, [5, 4])
    data = Shards(shards, shards, image_size=8, batch_size=4, num_workers=2, reader=reader)
    for make in (data.train_dataloader, data.val_dataloader):
        plain = next(iter(make()))["text"]
        found = next(iter(with_token_ids(make(), clip())))["text"]
        assert found == plain
        assert [caption.ids for caption in found] == [caption_ids(caption) for caption in plain]


def test_without_workers_or_a_tokenizer_text_stays_as_it_is(tmp_path):
    shards = write_shards(tmp_path, [5])
    data = Shards(shards, shards, image_size=8, batch_size=4)
    assert type(next(iter(with_token_ids(data.train_dataloader(), clip())))["text"][0]) is str
    data.num_workers = 1
    assert type(next(iter(with_token_ids(data.train_dataloader(), object())))["text"][0]) is str


def test_a_step_of_such_captions_is_the_same_and_tokenises_nothing(refused):
    stage, words = clip(), [LONG, "a ring", "a ring", ""]
    batch = {"key": list("abcd"), "image": torch.rand(4, 3, 8, 8), "text": words}
    plain = stage.losses(batch, SampleNoise("0", batch["key"]))
    given = {**batch, "text": [Caption(caption, caption_ids(caption)) for caption in words]}
    refused()
    found = stage.losses(given, SampleNoise("0", batch["key"]))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


def test_towers_of_different_contexts_read_the_same_ids(refused):
    words, towers = (
        [LONG, "a ring"],
        [TextTower(8, 1, 2, length, pad_id=pad) for length, pad in ((5, 0), (9, 7))],
    )
    plain = [tower.tokenize(words) for tower in towers], truncated(words, 9), num_chunks(LONG, 7)
    given = [Caption(caption, caption_ids(caption)) for caption in words]
    refused()
    found = [tower.tokenize(given) for tower in towers], truncated(given, 9), num_chunks(given[0], 7)
    assert all(map(torch.equal, found[0], plain[0])) and found[1:] == plain[1:]
    assert torch.equal(tokenize(given, 5), plain[0][0])


def test_a_caption_is_its_text_and_travels_with_its_ids():
    caption = Caption("a ring", [1, 2, 3])
    assert caption == "a ring" and hash(caption) == hash("a ring") and type(caption.upper()) is str
    for travelled in (pickle.loads(pickle.dumps(caption)), copy.deepcopy(caption)):
        assert (travelled, travelled.ids) == ("a ring", (1, 2, 3))
