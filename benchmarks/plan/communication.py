"""Bytes that each GPU receives in a step, by construction: the model of docs/scale.md for any stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.distributed.spread import share_out
from ldm.losses.contrastive import Softmax
from ldm.optim.muon import MuonOptimizer, multiplications
from ldm.stages.clip import CLIP
from ldm.stages.stage import Stage

NODE = 8
"""GPUs of a node."""
NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that a GPU receives from others of its node (H100), and of other nodes (400 Gb/s each)."""


@dataclass(frozen=True)
class Traffic:
    """What is sent.

    Args:
        name: What it is, and how it is sent.
        within: Bytes from GPUs of the same node.
        between: Bytes over the network, within a node too where all take part in one ring.
    """

    name: str
    within: float = 0.0
    between: float = 0.0

    @property
    def seconds(self) -> float:
        """Time that it takes if nothing else is sent."""
        return self.within / NVLINK + self.between / NETWORK


def traffic(stage: Stage, batch: int, world: int) -> list[Traffic]:
    """List what the strategies, the optimizer and the loss of a stage send in a step.

    Args:
        stage: Its weights may be anywhere.
        batch: Samples of a GPU.
        world: GPUs: at most a node, or some nodes.

    Raises:
        ValueError: If ``world`` is neither.
    """
    if world > NODE and world % NODE:
        raise ValueError(f"--gpus: got {world}, expected at most {NODE}, or a multiple of it")
    trained = [p for p in stage.parameters() if p.requires_grad]
    weights = 4 * sum(p.numel() for p in trained)
    ring = weights * (world - 1) / world
    found = [_over("ddp, float32", 2 * ring, world), _over("ddp, gradients: bfloat16", ring, world)]
    if all(p.ndim for p in trained):  # FSDP2 splits no single number
        found += sharded(weights, world)
    return [*found, *muon(stage, world), *pairs(stage, batch, world)]


def sharded(weights: int, world: int) -> list[Traffic]:
    """List what ``fsdp2`` and ``hsdp`` send: weights twice, in either type, and gradients in float32.

    Args:
        weights: Bytes of the trained weights in float32.
        world: GPUs.
    """
    ring = weights * (world - 1) / world
    found = [
        _over("fsdp2, float32", 3 * ring, world),
        _over("fsdp2, weights: bfloat16", 2 * ring, world),
    ]
    if (nodes := world // NODE) > 1:
        here = weights * (NODE - 1) / NODE
        there = 2 * weights / NODE * (nodes - 1) / nodes
        found += [
            Traffic("hsdp, float32", 3 * here, there),
            Traffic("hsdp, weights: bfloat16", 2 * here, there),
        ]
    return found


def muon(stage: Stage, world: int) -> list[Traffic]:
    """List the updates of Muon, in bfloat16: none of another optimizer."""
    optimizer = stage.optimizer.build(stage)
    if not isinstance(optimizer, MuonOptimizer):
        return []
    groups = [group["params"] for group in optimizer.param_groups if group["orthogonal"]]
    matrices = [p for group in groups for p in group if p.ndim >= 2]
    size = 2 * sum(p.numel() for p in matrices)
    return [
        Traffic("Muon's updates with ddp, within a node", longest_share(matrices, world)),
        _over("Muon's updates with fsdp2", 2 * size * (world - 1) / world**2, world),
    ]


def longest_share(matrices: Sequence[Tensor], world: int) -> float:
    """Return the bytes that each GPU of a node receives: all send as many as the largest share has."""
    num = min(world, NODE)
    shares = share_out([multiplications(p.shape[0], p.shape[1:].numel()) for p in matrices], num)
    return 2.0 * (num - 1) * max(sum(matrices[i].numel() for i in share) for share in shares)


def pairs(stage: Stage, batch: int, world: int) -> list[Traffic]:
    """List the vectors of a CLIP's pairs, in float32, and the hashes of captions."""
    if not isinstance(stage, CLIP):
        return []
    visual: Any = stage.net.model.visual
    vectors = 4.0 * batch * visual.output_dim * (world - 1)
    if isinstance(stage.loss, Softmax):
        found = _over("Softmax: vectors of all pairs, and their gradients", 4 * vectors, world)
    else:
        found = _over("Sigmoid: captions around the ring, and their gradients", 2 * vectors, world)
    return [found, _over("hashes of captions", 16 * batch * (world - 1), world)]


def _over(name: str, size: float, world: int) -> Traffic:
    return Traffic(name, within=size) if world <= NODE else Traffic(name, between=size)


def table(stage: Stage, batch: int, worlds: Sequence[int]) -> str:
    """Write the model for some numbers of GPUs as a table."""
    columns = {world: {each.name: each for each in traffic(stage, batch, world)} for world in worlds}
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    lines = [f"| received by each GPU in a step | {' | '.join(f'{world} GPUs' for world in worlds)} |"]
    lines.append("|---" * (len(worlds) + 1) + "|")
    for name in names:
        cells = [_cell(rows[name]) if name in rows else "" for rows in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(each: Traffic) -> str:
    sizes = [size for size in (each.within, each.between) if size] or [0.0]
    return f"{' + '.join(_bytes(size) for size in sizes)}, {each.seconds * 1e3:.3g} ms"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
