"""Sharded tensors: gathering, and optimizer steps on them (processes of gloo)."""

import math
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ldm.distributed.dtensor import (
    full_tensor,
    gather_full,
    half_context,
    is_sharded,
    reshard,
    shard_like,
    unshard,
)
from ldm.distributed.fsdp import mixed_precision
from ldm.optim.muon import MuonOptimizer

SHAPES = [(7, 3), (1, 5), (4,), (6, 2, 3, 3), (0, 2)]
ALONE: list[torch.Tensor] = []
"""Weights after steps of Muon, before processes met."""


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)
        self.kernel = nn.Parameter(
            torch.randn(3, 2, 3, 3) / 3
        )  # longer than wide, and fewer rows than processes

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.kernel.sum()


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def splits_and_gathers(rank, mesh):
    for tensor in tensors():
        rows = [Replicate()] * (mesh.ndim - 1)
        there = distribute_tensor(torch.zeros_like(tensor), mesh, [*rows, Shard(0)])
        mine = shard_like(tensor, there)
        assert isinstance(mine, DTensor) and mine.to_local().shape == there.to_local().shape
        assert torch.equal(full_tensor(mine), tensor)
        tree = {"a": [mine, {"b": 3}], "c": tensor}
        found = gather_full(tree, keep=rank == 0)
        assert found["a"][1] == {"b": 3} and torch.equal(found["c"], tensor)
        assert torch.equal(found["a"][0], tensor) if rank == 0 else found["a"][0] is None


def muon_steps(net):
    """Take three steps with the same gradients in all processes."""
    optimizer = MuonOptimizer(net.parameters())
    for seed in range(3):
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = shard_like(torch.randn(p.shape), p)
        optimizer.step()
    return [full_tensor(p) for p in net.parameters()]


def muon_steps_alike(rank, mesh):
    split = Pair()
    fully_shard(split, mesh=mesh)
    collectives = CommDebugMode()
    with collectives:
        spread = muon_steps(Pair())
    assert collectives.get_total_counts() > 0  # this process computed a share only
    for alone, ours, theirs in zip(ALONE, spread, muon_steps(split), strict=True):
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-7)  # weights of about 0.4, updates of 0.006
        torch.testing.assert_close(theirs, alone, rtol=0, atol=1e-7)


def unsharded_ranks_may_run_different_numbers_of_passes(rank, mesh):
    plain, split = Pair(), Pair()
    fully_shard(split.first, mesh=mesh)
    fully_shard(split, mesh=mesh, reshard_after_forward=False)
    x = torch.randn(2, 5)
    split(x).sum().backward()
    assert is_sharded(split) and not is_sharded(plain)
    with torch.inference_mode():
        unshard(split)
        for _ in range(rank):
            assert torch.equal(split(x), plain(x))
        reshard(split)
    assert all(isinstance(p, DTensor) for p in split.parameters())
    split.zero_grad()
    split(x).sum().backward()  # no memory of inference mode is left
    plain(x).sum().backward()
    for ours, theirs in zip(plain.parameters(), split.parameters(), strict=True):
        mean = ours.grad.clone()
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / mesh.size(), full_tensor(theirs.grad))


def bfloat16_weights_have_float32_gradients_and_masters(rank, mesh):
    net, size = nn.Linear(4, 4, bias=False), mesh.size()
    nn.init.constant_(net.weight, 1 + 2**-10)  # 1 in bfloat16
    fully_shard(net, mesh=mesh, mp_policy=mixed_precision("bfloat16"))
    x = 1.0 if rank == 0 else 2**-9
    y = net(torch.full((1, 4), x, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.tolist() == [[4 * x] * 4]
    y.sum().backward()
    weight, gradient = full_tensor(net.weight), full_tensor(net.weight.grad)
    assert torch.equal(weight, torch.full((4, 4), 1 + 2**-10))
    assert torch.equal(gradient, torch.full((4, 4), (1 + (size - 1) * 2**-9) / size))  # in bfloat16: 1 / size
    with torch.inference_mode():
        unshard(net)
        assert next(net.parameters()).dtype == torch.bfloat16
        with half_context(net):
            assert net(torch.ones(1, 4)).dtype == torch.bfloat16
        reshard(net)
        assert not half_context(net)._enabled


def process(rank, meeting, shape, checks):
    torch.set_num_threads(1)
    world = math.prod(shape)
    ALONE.extend(muon_steps(Pair()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("nodes", "processes")[-len(shape) :])
    for check in checks:
        check(rank, mesh)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is checked: gloo's threads may abort an interpreter that ends (once in 100 runs)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_split_over_processes_or_over_each_row_of_them(tmp_path, shape):
    checks = (
        splits_and_gathers,
        muon_steps_alike,
        unsharded_ranks_may_run_different_numbers_of_passes,
        bfloat16_weights_have_float32_gradients_and_masters,
    )
    mp.spawn(process, (tmp_path / "meeting", shape, checks), nprocs=math.prod(shape))


def test_unsharded_tensors_are_left_unchanged():
    tensor, net = torch.arange(3.0), Pair()
    assert full_tensor(tensor) is tensor and shard_like(tensor, torch.zeros(3)) is tensor
    tree = {"a": [tensor]}
    assert gather_full(tree, keep=False)["a"][0] is tensor
    reshard(net)
    unshard(net)
    assert not is_sharded(net) and all(p.requires_grad for p in net.parameters())
