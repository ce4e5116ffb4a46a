"""AdamW in one kernel against torch's own of many; steps that are clipped and skipped on the device."""

import copy

import pytest
import torch
from torch import nn

from ldm.optim.adamw import FusedAdamW, place_state
from ldm.optim.combined import CombinedOptimizer
from ldm.optim.gradients import HostNumber, clip, drop, part_norms, skip_if, total_norm
from ldm.optim.muon import MuonOptimizer
from ldm.optim.recipes import AdamW

BETAS = (0.9, 0.95)


def weights():
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    return [nn.Parameter(kernel), nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))]


def give_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator).contiguous()  # a kernel's is channels last


def plain(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, betas=BETAS, foreach=True)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_it_is_adamw_clipped_as_torch_clips():
    ours, theirs = weights(), weights()
    fused, reference = FusedAdamW(ours, 0.1, BETAS), plain(theirs)
    for step, scale in enumerate((1.0, 0.01, 30.0)):  # clipped, not clipped, clipped
        give_gradients(ours, step, scale)
        give_gradients(theirs, step, scale)
        clip(fused, part_norms(fused), 2.0)
        norm = nn.utils.clip_grad_norm_(theirs, 2.0)
        assert (norm > 2.0) == (scale != 0.01)
        fused.step()
        reference.step()
        assert_close(ours, theirs)


def test_a_skipped_step_leaves_no_trace():
    parameters = weights()
    optimizer = FusedAdamW(parameters, 0.1, BETAS)
    give_gradients(parameters, 0)
    optimizer.step()
    before = copy.deepcopy([p.detach() for p in parameters]), copy.deepcopy(optimizer.state_dict())
    give_gradients(parameters, 1, float("nan"))
    norms = part_norms(optimizer)
    clip(optimizer, norms, 1.0)
    assert skip_if(optimizer, total_norm(norms).isfinite().logical_not().float())
    optimizer.step()
    for p, then in zip(parameters, before[0], strict=True):
        assert torch.equal(p, then)
    for index, state in before[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer.state_dict()["state"][index][name]), name
    give_gradients(parameters, 2)
    optimizer.step()  # the numbers were for one step
    assert all(not torch.equal(p, then) for p, then in zip(parameters, before[0], strict=True))


def test_only_an_optimizer_that_is_fused_in_all_its_parts_skips_by_itself():
    parameters = weights()
    fused, muon = FusedAdamW(parameters[2:], 0.1, BETAS), MuonOptimizer(parameters[:2])
    bad = torch.ones(())
    assert not skip_if(muon, bad) and not skip_if(CombinedOptimizer([fused, muon]), bad)
    assert fused.found_inf is None
    assert skip_if(CombinedOptimizer([fused]), bad)
    give_gradients(parameters, 0)
    drop(muon)
    assert [p.grad is None for p in parameters] == [True, True, False]


def test_each_part_is_clipped_by_its_own_norm():
    parameters = weights()
    muon, fused = MuonOptimizer(parameters[:2]), FusedAdamW(parameters[2:], 0.1, BETAS)
    both = CombinedOptimizer([muon, fused])
    give_gradients(parameters, 0)
    before = [p.grad.clone() for p in parameters]
    norms = part_norms(both)
    expected = [sum(g.square().sum().item() for g in part) ** 0.5 for part in (before[:2], before[2:])]
    assert [norm.item() for norm in norms] == pytest.approx(expected, rel=1e-6)
    assert total_norm(norms).item() == pytest.approx(sum(n * n for n in expected) ** 0.5, rel=1e-6)
    clip(both, norms, 0.5)
    assert_close([p.grad for p in parameters[:2]], [0.5 / expected[0] * g for g in before[:2]])
    assert fused.grad_scale.item() == pytest.approx(expected[1] / 0.5, rel=1e-5)
    assert torch.equal(parameters[2].grad, before[2])  # divided in its step


def test_a_part_without_gradients_changes_nothing():
    parameters = weights()
    both = CombinedOptimizer([MuonOptimizer(parameters[:2]), FusedAdamW(parameters[2:], 0.1, BETAS)])
    give_gradients(parameters, 0)
    drop(both.optimizers[1])
    norms = part_norms(both)
    assert norms[1].item() == 0.0 and total_norm(norms) == norms[0] > 0.0
    clip(both, norms, 0.5)
    assert part_norms(both)[0].item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("then", [plain, lambda parameters: FusedAdamW(parameters, 0.1, BETAS)])
@pytest.mark.parametrize("now", [plain, lambda parameters: FusedAdamW(parameters, 0.1, BETAS)])
def test_the_state_of_one_implementation_goes_on_in_the_other(then, now):
    """Also if it was gathered from split weights, which have no channels last."""
    first, resumed, whole = weights(), weights(), weights()
    before, after, reference = then(first), now(resumed), plain(whole)
    for parameters, optimizer in ((first, before), (whole, reference)):
        give_gradients(parameters, 0)
        optimizer.step()
    saved = before.state_dict()
    for state in saved["state"].values():
        state.update({name: value.contiguous() for name, value in state.items()})
    options = {k: v for k, v in after.param_groups[0].items() if k != "params"}
    after.load_state_dict(saved)
    after.param_groups[0].update(options)  # as a stage does
    place_state(after)
    for p, q in zip(resumed, first, strict=True):
        p.data.copy_(q)
    for step in (1, 2):
        for parameters, optimizer in ((resumed, after), (whole, reference)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_close(resumed, whole)


def test_the_recipe_takes_it_for_plain_tensors():
    module = nn.Linear(3, 2)
    assert isinstance(AdamW().build(module), FusedAdamW)
    assert not isinstance(AdamW().build(module.to("meta")), FusedAdamW)


def test_a_number_of_the_host():
    assert HostNumber(torch.tensor(2.5)).read() == 2.5
