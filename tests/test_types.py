import pytest
import torch
from torch import nn

from ldm.stage_protocols import blocks_of
from ldm.types import Cond


def test_where_selects_samples_in_every_field():
    keep = torch.tensor([True, False, True])
    full = Cond(
        torch.ones(3, 4, 2), torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5), torch.ones(3, 1, 2, 2)
    )
    null = Cond(
        torch.zeros(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 5), torch.zeros(3, 1, 2, 2)
    )
    mixed = full.where(keep, null)
    for field in (mixed.tokens, mixed.mask, mixed.vector, mixed.spatial):
        assert field.flatten(1).float().mean(1).tolist() == [1.0, 0.0, 1.0]


def test_concatenation_appends_the_samples_of_every_field():
    first, second = (
        Cond(tokens=torch.full((n, 4, 2), n), mask=torch.full((n, 4), n == 1), vector=torch.full((n, 5), n))
        for n in (1, 2)
    )
    joined = first.concat(second)
    assert joined.spatial is None
    for field in (joined.tokens, joined.vector):
        assert field.flatten(1).float().mean(1).tolist() == [1.0, 2.0, 2.0]
    assert joined.mask.dtype == torch.bool and joined.mask[:, 0].tolist() == [True, False, False]


def test_conditions_with_different_fields_are_refused():
    with pytest.raises(ValueError, match="only one of condition and null condition has 'tokens'"):
        Cond(tokens=torch.ones(1, 1, 1)).where(torch.tensor([True]), Cond())
    with pytest.raises(ValueError, match="only one of condition and null condition has 'vector'"):
        Cond().concat(Cond(vector=torch.ones(1, 1)))


class Named(nn.ModuleDict):
    """A network or a stage that names all but its last child as blocks."""

    def blocks(self):
        return list(self.values())[:-1]


def test_a_stage_names_its_blocks_or_its_networks_do_each_once():
    first, second = (Named({name: nn.Linear(1, 1) for name in "abc"}) for _ in range(2))
    networks = nn.ModuleDict({"first": first, "again": first, "inner": nn.Sequential(second), "d": nn.ReLU()})
    assert blocks_of(networks) == [first["a"], first["b"], second["a"], second["b"]]
    assert blocks_of(Named({"first": first, "second": second})) == [first]
    assert blocks_of(nn.Linear(1, 1)) == []
