"""Equal captions are positives of each other; without any the loss is CLIP's own, to the bit."""

import math

import pytest
import torch
from torch.nn import functional as F

from ldm.losses.contrastive import contrastive


def logits(rows, columns):
    return 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def equal(captions, others=None):
    captions = torch.tensor(captions)
    return captions[:, None] == (captions if others is None else torch.tensor(others))


def test_without_equal_captions_it_is_radfords_loss_to_the_bit():
    image, text, own = logits(4, 8), logits(4, 8).flip(1), torch.arange(4) + 4
    expected = (F.cross_entropy(image, own) + F.cross_entropy(text, own)) / 2
    assert torch.equal(contrastive(image, text, own, equal([4, 5, 6, 7], list(range(8)))), expected)


def test_equal_captions_split_the_probability():
    image, text, own = logits(4, 4), logits(4, 4).T, torch.arange(4)
    found = contrastive(image, text, own, equal([0, 1, 0, 2]))
    expected = 0.0
    for table in (image.log_softmax(1), text.log_softmax(1)):
        for row, positives in enumerate([[0, 2], [1], [0, 2], [3]]):
            expected -= sum(table[row, p].item() for p in positives) / len(positives) / 4 / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_towers_that_know_captions_alone_reach_the_least_loss():
    same = 100.0 * equal([0, 1, 0, 1]).float()  # an image is as near to each caption that equals its own
    assert contrastive(same, same, torch.arange(4), equal([0, 1, 0, 1])).item() == pytest.approx(math.log(2))
