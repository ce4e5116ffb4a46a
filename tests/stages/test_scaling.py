"""Learning rates that follow the batch, and those that do not."""

import pytest
import torch

from ldm.stages.optimization import AdamW, Linear, Muon, SquareRoot, Unscaled


def test_rules_are_one_at_their_own_batch_and_compose():
    for rule in (Linear(64), SquareRoot(64), Unscaled()):
        assert rule.factor(64) == 1.0
    assert Linear(64).factor(512) == 8.0
    assert SquareRoot(64).factor(1024) == 4.0
    assert Unscaled().factor(10**6) == 1.0
    # four processes of one batch are one process of four
    assert SquareRoot(64).factor(4 * 64) ** 2 == Linear(64).factor(4 * 64)


def test_no_rule_unless_one_is_given():
    assert isinstance(AdamW().scaling, Unscaled)
    assert isinstance(Muon().scaling, Unscaled)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.scaling.batch: got 0, expected at least 1"):
        Linear(0)


@pytest.mark.parametrize("recipe", [AdamW, Muon])
def test_build_leaves_the_rate_to_the_stage(recipe):
    module = torch.nn.Linear(2, 2)
    optimizer = recipe(lr=0.5, scaling=Linear(1)).build(module)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
