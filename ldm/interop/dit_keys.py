"""Weights of a diffusion transformer by our names, by diffusers' and by facebookresearch/DiT's.

diffusers' ``DiTTransformer2DModel`` keeps a copy of the embeddings of timestep and class in each block, and
facebookresearch/DiT queries, keys and values in one matrix. The table of classes, the last row the null
class, is our conditioner's and their network's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.nets.positions import sincos_2d

Weights = Mapping[str, Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = {
    **{f"attn1.{name}": f"attn1.{name}" for name in ATTENTION},
    "ff.fc1": "ff.net.0.proj",
    "ff.fc2": "ff.net.2",
}
"""Our modules of a block and diffusers'."""
CROSS = {f"attn2.{name}": f"attn2.{name}" for name in ATTENTION}
"""The same of its cross-attention."""
EMBEDDING = "transformer_blocks.{}.norm1.emb."
"""diffusers' prefix of a block's copy of the embeddings."""
TABLE = "class_embedder.embedding_table.weight"
FACEBOOK_BLOCK = {
    "modulation.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.fc1": "mlp.fc1",
    "ff.fc2": "mlp.fc2",
}
FACEBOOK = {
    "patch_embedding": "x_embedder.proj",
    "time_embedding.linear_1": "t_embedder.mlp.0",
    "time_embedding.linear_2": "t_embedder.mlp.2",
    "modulation_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FACEBOOK_TABLE = "y_embedder.embedding_table.weight"


def dit_names(depth: int) -> dict[str, str]:
    """Name our weights as ``DiTTransformer2DModel`` does, embeddings as in its first block."""
    modules = {
        "patch_embedding": "pos_embed.proj",
        "modulation_out.linear": "proj_out_1",
        "proj_out": "proj_out_2",
        **{
            f"time_embedding.{n}": f"{EMBEDDING.format(0)}timestep_embedder.{n}"
            for n in ("linear_1", "linear_2")
        },
        **_blocks(depth, "transformer_blocks", {**BLOCK, "modulation.linear": "norm1.linear"}),
    }
    return _parameters(modules)


def pixart_names(depth: int) -> dict[str, str]:
    """Name our weights as ``PixArtTransformer2DModel`` does."""
    modules = {
        "patch_embedding": "pos_embed.proj",
        "modulation.linear": "adaln_single.linear",
        "proj_out": "proj_out",
        **{
            f"{ours}.{n}": f"{theirs}.{n}"
            for ours, theirs in (
                ("time_embedding", "adaln_single.emb.timestep_embedder"),
                ("token_embedding", "caption_projection"),
            )
            for n in ("linear_1", "linear_2")
        },
        **_blocks(depth, "transformer_blocks", {**BLOCK, **CROSS}),
    }
    tables = {
        f"transformer_blocks.{i}.modulation.table": f"transformer_blocks.{i}.scale_shift_table"
        for i in range(depth)
    }
    return {**_parameters(modules), **tables, "modulation_out.table": "scale_shift_table"}


def to_diffusers(weights: Weights, table: Tensor) -> dict[str, Tensor]:
    """Rename the weights of a class-conditional transformer; each block gets the embeddings.

    Args:
        weights: State dict of ``DiT``.
        table: (K + 1, hidden), vectors of the classes, that of the null class last.
    """
    depth = num_blocks(weights, "transformer_blocks.")
    found = {theirs: weights[ours] for ours, theirs in dit_names(depth).items()}
    first = EMBEDDING.format(0)
    found[first + TABLE] = table
    copies = {name.removeprefix(first): value for name, value in found.items() if name.startswith(first)}
    for i in range(1, depth):
        found |= {EMBEDDING.format(i) + name: value.clone() for name, value in copies.items()}
    return found


def from_diffusers(theirs: Weights, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Undo ``to_diffusers``.

    Args:
        theirs: Weights of a ``DiTTransformer2DModel``.
        name: The file, for messages.

    Raises:
        ValueError: If a weight is missing, or the embeddings of two blocks differ.
    """
    depth = num_blocks(theirs, "transformer_blocks.")
    found, first = dict(theirs), EMBEDDING.format(0)
    for i in range(1, depth):
        for key in [key for key in found if key.startswith(EMBEDDING.format(i))]:
            same = first + key.removeprefix(EMBEDDING.format(i))
            if same not in theirs or not torch.equal(found.pop(key), theirs[same]):
                raise ValueError(
                    f"{name}: {key} differs from {same}, expected the same embeddings in all blocks"
                )
    table = _taken(found, first + TABLE, name)
    return _renamed(found, dit_names(depth), name), table


def from_pixart(theirs: Weights, name: str) -> dict[str, Tensor]:
    """Rename the weights of a ``PixArtTransformer2DModel``.

    Raises:
        ValueError: If one is missing, or has no place here.
    """
    return _renamed(dict(theirs), pixart_names(num_blocks(theirs, "transformer_blocks.")), name)


def to_pixart(weights: Weights) -> dict[str, Tensor]:
    """Undo ``from_pixart``."""
    names = pixart_names(num_blocks(weights, "transformer_blocks."))
    return {theirs: weights[ours] for ours, theirs in names.items()}


def to_facebook(weights: Weights, table: Tensor, grid: int) -> dict[str, Tensor]:
    """Rename the weights of a class-conditional transformer as facebookresearch/DiT does.

    Args:
        weights: State dict of ``DiT``.
        table: (K + 1, hidden), vectors of the classes, that of the null class last.
        grid: Patches per side, of the fixed positions that they save.
    """
    depth = num_blocks(weights, "transformer_blocks.")
    found = {theirs: weights[ours] for ours, theirs in _facebook_names(depth).items()}
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [weights[f"transformer_blocks.{i}.attn1.{n}.{kind}"] for n in ATTENTION[:3]]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    found[FACEBOOK_TABLE] = table
    found["pos_embed"] = sincos_2d(grid, grid, table.shape[1], None, torch.device("cpu"))[None].clone()
    return found


def from_facebook(theirs: Weights, name: str) -> tuple[dict[str, Tensor], Tensor, int]:
    """Undo ``to_facebook``: weights, table of the classes, and patches per side.

    Args:
        theirs: Weights of a model of facebookresearch/DiT.
        name: The file, for messages.

    Raises:
        ValueError: If a weight is missing or unknown, or positions are not the fixed ones.
    """
    depth, found = num_blocks(theirs, "blocks."), dict(theirs)
    positions, table = (_taken(found, key, name) for key in ("pos_embed", FACEBOOK_TABLE))
    grid = round(positions.shape[1] ** 0.5)
    fixed = sincos_2d(grid, grid, positions.shape[2], None, torch.device("cpu"))
    if fixed.shape != positions.shape[1:] or (fixed - positions[0]).abs().max() > 1e-5:
        raise ValueError(f"{name}: pos_embed are not the fixed positions of a square grid, expected DiT's")
    split: dict[str, Tensor] = {}
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = _taken(found, f"blocks.{i}.attn.qkv.{kind}", name).chunk(3)
            names = [f"transformer_blocks.{i}.attn1.{n}.{kind}" for n in ATTENTION[:3]]
            split |= {n: part.clone() for n, part in zip(names, parts, strict=True)}
    return {**_renamed(found, _facebook_names(depth), name), **split}, table, grid


def num_blocks(weights: Iterable[str], prefix: str) -> int:
    """Count the blocks whose weights' names begin with ``prefix`` and a number."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in weights if key.startswith(prefix)})


def _facebook_names(depth: int) -> dict[str, str]:
    return _parameters({**FACEBOOK, **_blocks(depth, "blocks", FACEBOOK_BLOCK)})


def _blocks(depth: int, prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    return {
        f"transformer_blocks.{i}.{o}": f"{prefix}.{i}.{t}" for i in range(depth) for o, t in modules.items()
    }


def _parameters(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{o}.{kind}": f"{t}.{kind}" for o, t in modules.items() for kind in ("weight", "bias")}


def _renamed(theirs: dict[str, Tensor], names: Mapping[str, str], name: str) -> dict[str, Tensor]:
    found = {ours: _taken(theirs, key, name) for ours, key in names.items()}
    if theirs:
        raise ValueError(f"{name}: {len(theirs)} weights not expected ({', '.join(list(theirs)[:3])})")
    return found


def _taken(weights: dict[str, Tensor], key: str, name: str) -> Tensor:
    if key not in weights:
        raise ValueError(f"{name}: no weight {key}, expected those of a diffusion transformer")
    return weights.pop(key)
