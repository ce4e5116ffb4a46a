"""Token routing of a diffusion transformer: which tokens go where, who decides, and what it saves."""

import pytest
import torch
from tiny_model import randomised
from torch.utils.flop_counter import FlopCounterMode

from ldm.conditioners.none import Unconditional
from ldm.latents.space import Pixels
from ldm.losses import Alignment
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.routing import Route, Routing, Sprint
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.types import Cond, DenoiserDims

DIMS = DenoiserDims(sample=3)
SMALL = {"patch_size": 2, "hidden": 32, "depth": 4, "heads": 2}
MODERN = DiTOptions(positions="rotary", qk_norm=True, value_residual=True)
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])


def network(options=None, **route):
    torch.manual_seed(0)
    return randomised(DiT(DIMS, **SMALL, options=options, routing=Routing(**route) if route else None))


def noise(*keys, seed=0):
    return SampleNoise(seed, keys).like


@pytest.mark.parametrize("options", [None, MODERN], ids=["plain", "modern"])
def test_tokens_off_the_route_pass_by_and_the_others_see_each_other_alone(options):
    routed, plain = network(options, first=1, last=2), network(options)
    routed.train().draw_route(X, noise("a", "b"))
    kept = routed._route.kept
    assert kept.shape == (2, 8) and all(len(set(row)) == 8 for row in kept.tolist())
    states = {}
    for net, name in ((routed, "routed"), (plain, "plain")):
        for i, block in enumerate(net.transformer_blocks):
            block.register_forward_hook(lambda m, a, out, key=(name, i): states.update({key: (a, out)}))
    routed(X, T, Cond())
    plain.train()(X, T, Cond())
    torch.testing.assert_close(states["routed", 0][1][0], states["plain", 0][1][0])
    after, before = states["routed", 3][0][0], states["routed", 0][1][0]
    inside = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(after[~inside], before[~inside])
    # each sample alone, with its tokens gathered by hand
    for i in range(2):
        arguments = list(states["plain", 1][0])
        hidden, rotation, first = arguments[0], arguments[4], arguments[5]
        hidden = before[i : i + 1, kept[i]]
        rotation = None if rotation is None else rotation[:, kept[i]]
        first = None if first is None else first[i : i + 1, :, kept[i]]
        for block in plain.transformer_blocks[1:3]:
            hidden, first = block.forward(hidden, arguments[1][i : i + 1], None, None, rotation, first)
        torch.testing.assert_close(after[i : i + 1, kept[i]], hidden, rtol=1e-4, atol=1e-5)


def sprint(drop=0.0, ratio=0.5):
    torch.manual_seed(0)
    return randomised(DiT(DIMS, **SMALL, options=MODERN, routing=Sprint(1, 2, ratio, drop)))


def outputs_of(net, run):
    """Run it, and return the hidden states after blocks 0 and 2 and what block 3 gets."""
    found = {}
    for i in range(4):
        net.transformer_blocks[i].register_forward_hook(lambda m, a, out, i=i: found.update({i: (a, out)}))
    run(net)
    return found[0][1][0], found[2][1][0], found[3][0][0]


def fused(net, before, after):
    return net.route_end.linear(torch.cat([before, after], -1))


def test_sprint_fuses_both_paths_and_a_vector_stands_for_absent_tokens():
    net = sprint().train()
    net.draw_route(X, noise("a", "b"))
    kept = net._route.kept
    assert not net._route.is_dropped.any()
    before, on_route, after = outputs_of(net, lambda net: net(X, T, Cond()))
    inside = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    absent = net.route_end.absent.expand(2, 16, 32)
    expected = fused(net, before, absent)
    assert torch.equal(after[~inside], expected[~inside])
    whole = absent.clone()
    for i in range(2):
        whole[i, kept[i]] = on_route[i]
    torch.testing.assert_close(after, fused(net, before, whole))
    before, on_route, after = outputs_of(net.eval(), lambda net: net(X, T, Cond()))
    assert on_route.shape == (2, 16, 32) and torch.equal(after, fused(net, before, on_route))


def test_sprint_drops_what_comes_out_of_the_route_of_some_samples():
    net, count = sprint(drop=0.3), 2000
    keys = list(map(str, range(count)))
    net.draw_route(torch.zeros(count, 3, 8, 8), noise(*keys))
    dropped = net._route.is_dropped
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.04)
    net.draw_route(torch.zeros(3, 3, 8, 8), noise(*keys[:3]))
    assert torch.equal(net._route.is_dropped, dropped[:3]), "a function of the sample"
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 900])
    kept = net._route.kept
    net.train()._route = Route(kept, torch.tensor([[False], [True], [False]]))
    before, _, after = outputs_of(net, lambda net: net(x, t, Cond()).square().sum().backward())
    alone = fused(net, before, net.route_end.absent.expand(3, 16, 32))
    torch.testing.assert_close(after[1], alone[1])
    assert not torch.allclose(after[0], alone[0])
    assert all(weight.grad is not None for weight in net.parameters())
    with pytest.raises(ValueError, match=r"denoiser\.routing\.drop must be in \[0, 1\), got 1"):
        Sprint(1, 2, drop=1.0)


def test_sampling_and_validation_route_nothing():
    routed, plain = network(first=1, last=2).eval(), network().eval()
    routed.draw_route(X, noise("a", "b"))
    assert torch.equal(routed(X, T, Cond()), plain(X, T, Cond()))
    routed.train()
    assert not torch.equal(routed(X, T, Cond()), plain(X, T, Cond()))
    assert routed.state_dict().keys() == plain.state_dict().keys()


def test_the_tokens_of_a_sample_are_a_function_of_seed_and_key():
    net = network(first=1, last=2)

    def kept(*keys, seed=0):
        net.draw_route(torch.zeros(len(keys), 3, 8, 8), noise(*keys, seed=seed))
        return net._route.kept

    both = kept("a", "b")
    assert torch.equal(both[1:], kept("b")) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, kept("a", "b", seed=1))
    counts = torch.zeros(16)
    for row in kept(*map(str, range(400))):
        counts[row] += 1
    assert counts.min() > 150 and counts.max() < 250  # 200 each, standard deviation 10


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 8), (0.75, 4), (0.01, 16), (0.99, 1)])
def test_the_ratio_is_that_of_tokens_that_pass_by(ratio, count):
    assert Routing(1, 2, ratio).draw(3, 16, X, noise("a", "b", "c")).kept.shape == (3, count)


def test_what_is_taken_and_put_back_is_as_it_was():
    route, x = Route(torch.tensor([[0, 3], [1, 2]])), torch.randn(2, 4, 5)
    assert torch.equal(route.back(x, route.take(x, None, None)[0]), x)
    assert torch.equal(route.back(x, torch.zeros(2, 2, 5))[0, [1, 2]], x[0, [1, 2]])


def test_a_training_step_draws_the_route_by_the_samples_and_all_learns():
    torch.manual_seed(0)
    model = Diffusion(
        Pixels(), Unconditional(), lambda dims: randomised(DiT(dims, **SMALL, routing=Routing(1, 2)))
    )
    batch = {"key": ["a", "b"], "image": X.clamp(-1, 1)}
    losses = []
    for keys in (["a", "b"], ["a"], ["b"]):
        rows = [["a", "b"].index(key) for key in keys]
        part = {"key": keys, "image": batch["image"][rows]}
        losses.append(model.train().losses(part, SampleNoise(0, keys))["loss"])
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)
    losses[0].backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_flops_of_a_training_step_of_dit_b():
    """On the meta device: of B/2 on 256 tokens, blocks 1 to 10 of 12."""

    def flops(**routing):
        with torch.device("meta"):
            route = Routing(1, 10, **routing) if routing else None
            net = DiT(DenoiserDims(sample=4), hidden=768, depth=12, heads=12, routing=route)
            x, t = torch.zeros(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64)
        net.train().draw_route(x, lambda like: like)
        with FlopCounterMode(display=False) as counter:
            net(x, t, Cond()).sum().backward()
        return counter.get_total_flops()

    whole = flops()
    assert flops(ratio=0.5) / whole == pytest.approx(0.573, abs=0.002)
    assert flops(ratio=0.6) / whole < 0.49


@pytest.mark.parametrize(
    ("route", "says"),
    [
        ({"first": 0, "last": 2}, "got first 0, last 2, ratio 0.5, expected 1 <= first <= last"),
        ({"first": 3, "last": 2}, "got first 3, last 2"),
        ({"first": 1, "last": 2, "ratio": 1.0}, "ratio 1.0"),
        ({"first": 1, "last": 4}, "routing.last: got 4, expected at most 3, the last of 4 blocks"),
    ],
)
def test_a_route_that_is_not_possible_is_refused(route, says):
    with pytest.raises(ValueError, match=says):
        network(**route)


def test_blocks_on_the_route_are_not_aligned():
    term = Alignment(torch.nn.Identity, "transformer_blocks.2")
    with pytest.raises(ValueError, match=r"only some tokens go through the block 'transformer_blocks.2'"):
        Diffusion(
            Pixels(), Unconditional(), lambda dims: DiT(dims, **SMALL, routing=Routing(1, 2)), losses=[term]
        )
