"""Learning rates that follow the batch, and those that do not."""

import pytest
import torch

from ldm.optim.recipes import AdamW, LinearScaling, Muon, NoScaling, SquareRootScaling


def test_rules_are_one_at_their_own_batch_and_compose():
    for rule in (LinearScaling(64), SquareRootScaling(64), NoScaling()):
        assert rule.factor(64) == 1.0
    assert LinearScaling(64).factor(512) == 8.0
    assert SquareRootScaling(64).factor(1024) == 4.0
    assert NoScaling().factor(10**6) == 1.0
    # four processes of one batch are one process of four
    assert SquareRootScaling(64).factor(4 * 64) ** 2 == LinearScaling(64).factor(4 * 64)


def test_no_rule_unless_one_is_given():
    assert isinstance(AdamW().scaling, NoScaling)
    assert isinstance(Muon().scaling, NoScaling)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.scaling.batch: got 0, expected at least 1"):
        LinearScaling(0)


@pytest.mark.parametrize("recipe", [AdamW, Muon])
def test_build_leaves_the_rate_to_the_stage(recipe):
    module = torch.nn.Linear(2, 2)
    optimizer = recipe(lr=0.5, scaling=LinearScaling(1)).build(module)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
