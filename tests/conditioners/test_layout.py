"""Layouts are sets of boxes."""

import pytest
import torch

from ldm.conditioners.composite import Composite
from ldm.conditioners.layout import Layout, waves
from ldm.rng import SampleNoise

BOXES = torch.tensor([[0, 0.1, 0.2, 0.4, 0.5], [2, 0.5, 0.5, 1.0, 0.9], [1, 0.0, 0.0, 1.0, 1.0]])


def layouts(*boxes):
    return {"key": [f"k{i}" for i in range(len(boxes))], "layout": list(boxes)}


def conditioner(**settings):
    torch.manual_seed(0)
    return Layout(3, width=16, max_boxes=4, num_heads=2, **settings)


def test_permuted_boxes_are_permuted_tokens():
    order = torch.tensor([2, 0, 1])
    cond = conditioner()(layouts(BOXES, BOXES[order]))
    assert torch.allclose(cond.tokens[0, 0], cond.tokens[1, 0], atol=1e-5), "the scene's token"
    assert torch.allclose(cond.tokens[0, 1:4][order], cond.tokens[1, 1:4], atol=1e-5)
    assert not torch.allclose(cond.tokens[0, 1:4], cond.tokens[1, 1:4], atol=1e-2)


def test_the_mask_marks_the_scene_and_real_boxes():
    cond = conditioner()(layouts(BOXES, BOXES[:1], BOXES[:0]))
    assert cond.tokens.shape == (3, 5, 16)
    assert cond.mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_padding_and_other_samples_change_nothing():
    alone, batched = (conditioner()(layouts(*boxes)) for boxes in ([BOXES[:2]], [BOXES[:2], BOXES]))
    assert torch.allclose(alone.tokens[0, :3], batched.tokens[0, :3], atol=1e-6)
    wider = conditioner()
    wider.max_boxes = 9
    assert torch.allclose(alone.tokens[0, :3], wider(layouts(BOXES[:2])).tokens[0, :3], atol=1e-6)


def test_every_coordinate_and_the_class_count():
    cond = conditioner()
    before = cond(layouts(BOXES)).tokens
    for column, step in enumerate([1.0, 0.02, 0.02, 0.02, 0.02]):
        moved = BOXES.clone()
        moved[0, column] += step
        assert (cond(layouts(moved)).tokens - before)[0, 1].abs().max() > 1e-3, column


def test_waves_match_their_closed_form():
    x = torch.tensor([[0.25, 0.5]])
    found = waves(x).view(2, 2, 8)
    for k in range(8):
        assert torch.allclose(found[:, 0, k], (torch.pi * 2**k * x[0]).sin(), atol=1e-5)
        assert torch.allclose(found[:, 1, k], (torch.pi * 2**k * x[0]).cos(), atol=1e-5)


def test_no_box_differs_from_nothing_known():
    cond, data = conditioner(), layouts(BOXES[:0])
    null = cond.null(data)
    assert torch.equal(null.mask, cond(data).mask)
    assert not torch.allclose(null.tokens[:, 0], cond(data).tokens[:, 0], atol=1e-2)


def test_dropout_replaces_all_of_a_sample_by_the_null_condition():
    cond, data = conditioner(dropout=0.5), layouts(*[BOXES] * 16)
    lost = SampleNoise(0, data["key"]).uniform() < 0.5
    found = cond.dropped(data, SampleNoise(0, data["key"]))
    assert 0 < lost.sum() < 16
    assert torch.equal(found.tokens[lost], cond.null(data).tokens[lost])
    assert torch.equal(found.mask.sum(1), torch.where(lost, 1, 4))


def test_gradients_reach_every_parameter():
    cond = conditioner()
    found = cond(layouts(BOXES))
    (found.tokens[found.mask].square().sum() + cond.null(layouts(BOXES)).tokens[0, 0].sum()).backward()
    rows = cond.embedding.weight.grad.abs().sum(1)
    assert (rows > 0).all(), "three classes, scene and null condition"
    assert all(p.grad.abs().sum() > 0 for p in cond.parameters())


def test_of_too_many_boxes_the_first_are_taken_with_a_warning_and_a_share():
    cond, data = conditioner(), layouts(BOXES, torch.cat([BOXES, BOXES]))
    cut = layouts(BOXES, torch.cat([BOXES, BOXES])[:4])
    assert torch.equal(cond(data).tokens, cond(cut).tokens)
    assert cond.truncated(cut) == {"truncated_layouts": 0.0}
    with pytest.warns(UserWarning, match=r"1 of 2 layouts are cut to the first 4 .* 'k1' has 6"):
        cond.check(data)
    assert Composite([conditioner()]).truncated(data) == {"truncated_layouts": 0.5}


def test_a_class_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"sample 'k1': class 3 of a box .* expected 0 to 2"):
        conditioner().check_values(layouts(BOXES, BOXES + torch.tensor([1.0, 0, 0, 0, 0])))
