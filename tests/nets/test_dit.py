"""The diffusion transformer: positions, initialisation, options and what it refuses."""

import pytest
import torch
from tiny_model import randomised, relative

from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.positions import rotary_2d, rotate, sincos_2d
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

CPU = torch.device("cpu")
SMALL = {"patch_size": 2, "hidden": 32, "depth": 3, "heads": 2}
ALL = DenoiserDims(sample=4, tokens=6, vector=5, spatial=3)
MODERN = {"positions": "rotary", "rms_norm": True, "qk_norm": True, "swiglu": True, "value_residual": True}


def condition(count, size=8):
    mask = torch.tensor([[True, True, False]] * count)
    return Cond(torch.randn(count, 3, 6), mask, torch.randn(count, 5), torch.randn(count, 3, size, size))


def test_scores_of_rotated_queries_and_keys_depend_on_the_offset_alone():
    q, k = torch.randn(2, 16).double()
    table = rotary_2d(5, 7, 16, None, CPU).double()
    grid = lambda x: rotate(x.expand(1, 1, 35, 16), table)[0, 0].view(5, 7, 16)  # noqa: E731
    scores = torch.einsum("abd,ijd->abij", grid(q), grid(k))
    assert torch.allclose(scores[0, 0, 1, 2], scores[3, 4, 4, 6], rtol=1e-5)
    assert torch.allclose(scores[2, 3, 0, 1], scores[4, 5, 2, 3], rtol=1e-5)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3, "rows are not columns"
    assert torch.allclose(grid(q).norm(dim=-1), q.norm().expand(5, 7), rtol=1e-6)


def test_positions_on_a_grid_reach_as_far_at_every_size():
    fine, coarse = (sincos_2d(n, n, 8, 4.0, CPU).view(n, n, 8) for n in (8, 4))
    assert torch.allclose(fine[::2, ::2], coarse, atol=1e-6)
    counted = sincos_2d(8, 6, 8, None, CPU).view(8, 6, 8)
    assert torch.equal(counted[:4, :4], sincos_2d(4, 4, 8, None, CPU).view(4, 4, 8))
    assert len({tuple(each) for each in counted.view(48, 8).tolist()}) == 48


@pytest.mark.parametrize("modulation", ["block", "single"])
@pytest.mark.parametrize("more", [{}, MODERN], ids=["plain", "modern"])
def test_it_begins_at_zero_and_all_of_it_learns(modulation, more):
    torch.manual_seed(0)
    net = DiT(ALL, **SMALL, options=DiTOptions(modulation, **more))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, t, cond, target = (
        torch.randn(4, 4, 8, 8),
        torch.tensor([1, 9, 500, 900]),
        condition(4),
        torch.randn(4, 4, 8, 8),
    )
    assert not net(x, t, cond).any(), "the output is zero, and so is what modulates the blocks"
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (net(x, t, cond) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("more", [{}, MODERN, {"positions": "both"}], ids=["plain", "modern", "both"])
def test_any_height_and_width_and_every_patch_in_its_place(more):
    net = randomised(DiT(DenoiserDims(sample=4), **SMALL, options=DiTOptions(**more))).double()
    x, t = torch.randn(1, 4, 6, 10).double(), torch.tensor([40])
    got = net(x, t, Cond())
    assert got.shape == x.shape
    turned = net(x.flip(3), t, Cond()).flip(3)
    assert relative(turned, got) > 1e-3, "positions matter"
    again = net(torch.cat([x, x + 1]), torch.tensor([40, 7]), Cond())
    assert relative(again[:1], got) < 1e-10, "samples do not see each other"


def test_masked_tokens_do_not_matter():
    net = randomised(DiT(ALL, **SMALL)).double()
    cond = condition(2)
    cond = Cond(cond.tokens.double(), cond.mask, cond.vector.double(), cond.spatial.double())
    x, t = torch.randn(2, 4, 8, 8).double(), torch.tensor([1, 500])
    changed = cond.tokens.clone()
    changed[:, 2:] += 1.0
    other = Cond(changed, cond.mask, cond.vector, cond.spatial)
    assert torch.equal(net(x, t, cond), net(x, t, other))
    unmasked = Cond(changed, None, cond.vector, cond.spatial)
    assert not torch.allclose(net(x, t, cond), net(x, t, unmasked))


def test_values_of_the_first_block_reach_the_last():
    net = randomised(DiT(DenoiserDims(sample=4), **SMALL, options=DiTOptions(value_residual=True)))
    seen = []
    for block in net.blocks():
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[-1], output)))
    x = torch.randn(1, 4, 8, 8)
    net(x, torch.tensor([1]), Cond())
    (none, (hidden, values)), (second, _), (third, _) = seen
    assert none is None and hidden.shape == (1, 16, 32)
    assert values.shape == (1, 2, 16, 16) and second is third is values


def test_half_the_tables_made_while_sampling_serve_training():
    net = DiT(DenoiserDims(sample=4), **SMALL, options=DiTOptions(positions="both"))
    x, t = torch.randn(1, 4, 4, 20), torch.tensor([1])
    with torch.inference_mode():
        net(x, t, Cond())
    net(x, t, Cond()).square().sum().backward()


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_two_times_and_more_channels_where_the_objective_wants_them(kind):
    widths = DenoiserDims(sample=4, output=8, times=2)
    net = DiT(widths, **SMALL) if kind == "dit" else UNet(widths, (8, 8), 1, (False, False), 1, 4)
    net = randomised(net)
    x = torch.randn(2, 4, 8, 8)
    once, other = (net(x, torch.tensor([[5.0, s], [7.0, s]]), Cond()) for s in (0.0, 300.0))
    assert once.shape == (2, 8, 8, 8) and not torch.allclose(once, other)


def test_what_has_no_place_is_refused_by_name():
    x, t = torch.zeros(1, 4, 6, 8), torch.zeros(1)
    with pytest.raises(ValueError, match=r"patch_size: patches of side 4 do not tile a latent of 6x8"):
        DiT(DenoiserDims(4), 4, 32, 1, 2)(x, t, Cond())
    for net in (DiT(DenoiserDims(4), 2, 32, 1, 2), UNet(DenoiserDims(4), (8, 8), 1, (True, True), 1, 4)):
        with pytest.raises(
            ValueError, match="the condition has tokens, for which the denoiser was built without"
        ):
            net(x, t, Cond(tokens=torch.zeros(1, 2, 6)))
        with pytest.raises(ValueError, match=r"condition maps of 0 channels.*got 3 channels of 6x8"):
            net(x, t, Cond(spatial=torch.zeros(1, 3, 6, 8)))
    for net in (
        DiT(DenoiserDims(4, vector=5), 2, 32, 1, 2),
        UNet(DenoiserDims(4, vector=5), (8, 8), 1, (True, True), 1, 4),
    ):
        with pytest.raises(
            ValueError, match="was built for a vector as its condition, but the condition has none"
        ):
            net(x, t, Cond())
    with pytest.raises(ValueError, match=r"hidden must be a multiple of 4 and of heads.*got 30 and 4 heads"):
        DiT(DenoiserDims(4), 2, 30, 1, 4)
