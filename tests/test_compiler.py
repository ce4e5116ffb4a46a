"""Blocks compiled where no gradients are computed: the same numbers, for full batches alone, or plainly."""

import pytest
import torch
from torch import nn

from ldm.compiler import ENOUGH_PASSES, CompiledForward, InferenceCompiler
from ldm.nets.autoencoder import KLAutoencoder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def graphs(tmp_path, monkeypatch):
    """Shapes of the feature maps that each compiled graph is for."""
    found = []

    def backend(graph, inputs):
        found.append(max((x.shape for x in inputs if x.ndim == 4), key=lambda shape: shape[-1]))
        return graph.forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing compiled before
    monkeypatch.setattr(InferenceCompiler, "backend", staticmethod(backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def autoencoder():
    torch.manual_seed(0)
    return KLAutoencoder(2, [8, 8], layers_per_block=1, norm_groups=4).eval().requires_grad_(False)


def block():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.SiLU(), nn.Conv2d(3, 3, 1))


def encoded(net, compiler, *sizes):
    """Encode batches of images of 16 pixels in turn."""
    torch.manual_seed(1)
    found = []
    for size in sizes:
        with torch.inference_mode(), compiler.batch(size):
            found.append(net.encode(torch.randn(size, 3, 16, 16)).mean)
    return found


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_full_batches_are_compiled_once_and_the_last_one_is_not(graphs, capsys):
    net, compiler = autoencoder(), InferenceCompiler("on")
    plain = encoded(autoencoder(), InferenceCompiler(), 4, 4, 3)
    compiler.begin(net.blocks(), CPU, 11, 4)
    assert "--compile: the first batch takes" in capsys.readouterr().err
    assert_equal(encoded(net, compiler, 4), plain[:1])
    num = len(graphs)
    assert num == 3 and {shape[0] for shape in graphs} == {4}
    assert_equal(encoded(net, compiler, 4, 4, 3), plain)
    assert len(graphs) == num


def test_gradients_are_computed_plainly(graphs):
    net, compiler = autoencoder(), InferenceCompiler("on")
    compiler.begin(net.blocks(), CPU, 4, 4)
    net.encode(torch.randn(4, 3, 16, 16, requires_grad=True)).mean.sum().backward()
    assert not graphs


def test_of_many_shapes_the_first_are_compiled(graphs):
    net, compiler = block(), InferenceCompiler("on")
    compiler.begin([net], CPU, 99, 2)
    for side in (4, 5, 6, 7, 8, 9, 4):
        with torch.inference_mode(), compiler.batch(2):
            net(torch.randn(2, 3, side, side))
    assert [shape[-1] for shape in graphs] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("choice", "device", "passes", "is_compiled"),
    [
        ("auto", CPU, 10 * ENOUGH_PASSES, False),
        ("auto", GPU, ENOUGH_PASSES - 1, False),
        ("auto", GPU, ENOUGH_PASSES, True),
        ("on", CPU, 1, True),
        ("off", GPU, 10 * ENOUGH_PASSES, False),
    ],
)
def test_what_is_compiled_by_itself(choice, device, passes, is_compiled):
    net = autoencoder()
    InferenceCompiler(choice).begin(net.blocks(), device, passes, 4)
    assert any(isinstance(block.forward, CompiledForward) for block in net.blocks()) == is_compiled


def test_where_the_compiler_fails_the_command_goes_on_and_says_so_once(graphs, monkeypatch, capsys):
    def fails(graph, inputs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(InferenceCompiler, "backend", staticmethod(fails))
    net, compiler = autoencoder(), InferenceCompiler("on")
    compiler.begin(net.blocks(), CPU, 8, 4)
    assert_equal(encoded(net, compiler, 4, 4), encoded(autoencoder(), InferenceCompiler(), 4, 4))
    assert capsys.readouterr().err.count("warning: --compile: the command goes on without it") == 1


@pytest.mark.slow
@pytest.mark.versions
def test_the_compiler_itself_computes_the_same(graphs, monkeypatch, programs):
    programs("g++", "g++")
    monkeypatch.setattr(InferenceCompiler, "backend", "inductor")
    torch.manual_seed(0)
    net, compiler, x = block(), InferenceCompiler("on"), torch.randn(2, 3, 8, 8)
    plain = net(x).detach()
    compiler.begin([net], CPU, 2, 2)
    with torch.inference_mode(), compiler.batch(2):
        torch.testing.assert_close(net(x), plain, rtol=1e-5, atol=1e-6)
    assert not compiler.has_failed and len(net.forward.signatures) == 1
