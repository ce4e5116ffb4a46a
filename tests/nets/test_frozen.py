import copy

import torch
from torch import nn

from ldm.nets.frozen import Frozen


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.tower = Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))


def test_a_frozen_module_is_invisible_to_training_and_checkpoints():
    owner = Owner()
    assert {n for n, _ in owner.named_parameters()} == {"head.weight", "head.bias"}
    assert set(owner.state_dict()) == {"head.weight", "head.bias"}
    owner.load_state_dict(owner.state_dict(), strict=True)
    assert not any(p.requires_grad for p in owner.tower.module.parameters())


def test_it_stays_in_eval_mode_and_moves_with_its_owner():
    owner = Owner().train()
    assert not owner.tower.module.training and not owner.tower.module[1].training
    owner.double()
    assert owner.tower.module[0].weight.dtype == torch.float64
    owner.to("meta")
    assert owner.tower.module[0].weight.is_meta


def test_copies_refer_to_the_same_module():
    owner = Owner()
    assert copy.deepcopy(owner).tower.module is owner.tower.module
