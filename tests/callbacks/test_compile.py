"""The compiler itself, on small networks: the same numbers, no more graphs than there are kinds of blocks."""

import copy
import fcntl

import pytest
import torch
import torch.nn.functional as F
from tiny_stage import trainer
from torch import nn
from torch._dynamo import register_backend

from ldm.callbacks.compile import Compile
from ldm.compiler import CompiledForward, one_process_first
from ldm.nets.attention import Transformer2D
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

GRAPHS = []
"""Of each graph that was compiled: whether it has symbolic sizes."""


@register_backend
def counted(graph, inputs):
    GRAPHS.append(any(isinstance(value, torch.SymInt) for value in inputs))
    return graph.forward


class TwoSizes(nn.Module):
    """The least that torch 2.14 failed on: a block at a second height, which it compiles for all heights."""

    def __init__(self):
        super().__init__()
        self.large, self.small = (Transformer2D(8, None, 2, norm_groups=4) for _ in range(2))

    def blocks(self):
        return [self.large, self.small]

    def forward(self, x):
        return self.small(F.avg_pool2d(self.large(x, None, None), 2), None, None)


def compiled(net, tmp_path, callback):
    """A copy whose blocks are compiled."""
    stage = nn.ModuleDict({"net": copy.deepcopy(net)})
    callback.on_fit_start(trainer(tmp_path), stage)
    return stage["net"]


def trained(net, x, steps=2):
    """Take steps of gradient descent; return the gradients of the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.grad for p in net.parameters()]


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing compiled before
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield TwoSizes()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.versions
def test_the_compiler_computes_the_same_and_nothing_anew(net, tmp_path, programs):
    """Forwards, backwards, in evaluation and for a smaller last batch; a second run has the same bits."""
    programs("g++", "g++")
    first, second = (compiled(net, tmp_path, Compile(on_cpu=True)) for _ in range(2))
    x, before = torch.randn(2, 8, 8, 8), num_graphs()
    found = trained(first, x)
    assert num_graphs() == before + 2
    with torch.no_grad():
        plain = copy.deepcopy(first)
        assert not isinstance(plain.small.forward, CompiledForward)
        assert torch.equal(first(x), plain(x))  # in evaluation blocks are not compiled
    trained(first, x[:1], steps=1)
    for grad, other in zip(trained(net, x), found, strict=True):
        torch.testing.assert_close(other, grad)
    assert all(torch.equal(a, b) for a, b in zip(trained(second, x), found, strict=True))
    assert num_graphs() == before + 2


@pytest.mark.slow
def test_a_unet_has_fewer_graphs_than_blocks_and_none_of_any_size(net, tmp_path):
    dims = DenoiserDims(sample=4, tokens=8)
    attends, callback = [True, True, True, False], Compile("counted", on_cpu=True)
    sd1 = UNet(dims, [4, 8, 16, 16], 2, attends, num_heads=2, norm_groups=4)
    sd1 = compiled(sd1.to(memory_format=torch.channels_last), tmp_path, callback)
    x, t, tokens = torch.randn(2, 4, 32, 32), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    del GRAPHS[:]
    sd1(x, t, Cond(tokens)).mean().backward()
    assert len(GRAPHS) == 18 and not any(GRAPHS)  # 22 ResNet blocks of 14 kinds, 16 transformers of 4
    sd1(x, t, Cond(tokens)).mean().backward()
    with torch.no_grad():
        sd1.eval()(x[:1], t[:1], Cond(tokens[:1]))
    assert len(GRAPHS) == 18


@pytest.mark.slow
def test_without_a_compiler_a_run_goes_on_and_says_so_once(net, tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        broken = compiled(net, tmp_path, Compile(on_cpu=True))
        x = torch.randn(2, 8, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(trained(broken, x), trained(net, x), strict=True))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "C++ compiler" in line and len(line) <= 300


@pytest.mark.slow
def test_an_error_of_the_backward_pass_is_found_in_the_forward_pass(net, tmp_path, capsys):
    def backward(graph, inputs):
        raise RuntimeError("no kernel")

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=lambda graph, _: graph.forward, bw_compiler=backward
    )
    broken = compiled(net, tmp_path, Compile(backend, on_cpu=True))
    trained(broken, torch.randn(2, 8, 8, 8))
    assert capsys.readouterr().err.count("training goes on without it: RuntimeError: no kernel") == 1


@pytest.mark.slow
def test_memory_that_is_used_up_is_no_failure_of_the_compiler(net, tmp_path):
    def full(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    with pytest.raises(torch.OutOfMemoryError):
        trained(compiled(net, tmp_path, Compile(full, on_cpu=True)), torch.randn(2, 8, 8, 8))


def test_on_a_cpu_nothing_is_compiled_unless_asked_for(net, tmp_path):
    found = compiled(net, tmp_path, Compile())
    assert not any(isinstance(block.forward, CompiledForward) for block in found.blocks())


def test_frozen_blocks_are_left_alone(net, tmp_path):
    net.large.requires_grad_(False)
    found = compiled(net, tmp_path, Compile(on_cpu=True))
    assert [isinstance(block.forward, CompiledForward) for block in found.blocks()] == [False, True]


def test_a_copy_computes_with_its_own_weights(net, tmp_path):
    first = compiled(net, tmp_path, Compile("eager", on_cpu=True))
    second = copy.deepcopy(first)
    x = torch.randn(2, 8, 8, 8)
    trained(second, x)
    assert torch.equal(trained(first, x)[0], trained(net, x)[0])
    assert list(first.state_dict()) == list(net.state_dict())


def test_what_a_run_says_before_it_compiles(net, tmp_path, capsys):
    callback = Compile("eager", on_cpu=True)
    stage = nn.ModuleDict({"net": net})
    callback.on_fit_start(trainer(tmp_path), stage)
    callback.on_train_start(trainer(tmp_path), stage)
    assert capsys.readouterr().out.startswith("Compile: 2 blocks of 1 kinds are compiled in the first steps")


def test_one_process_is_first_and_the_others_follow_together(net, tmp_path):
    """Whoever comes later waits for the first, but not for each other."""
    with one_process_first("a"):
        (path,) = (tmp_path / "cache").glob("ldm-*.lock")
        with path.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with one_process_first("b"):  # of another kind
            pass
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with one_process_first("a"), path.open("w") as third:
            fcntl.flock(third, fcntl.LOCK_SH | fcntl.LOCK_NB)
