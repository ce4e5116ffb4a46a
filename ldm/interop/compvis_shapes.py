"""Arguments of networks derived from the weights of a CompVis file, which has no configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor

from ldm.types import DenoiserDims

HEAD_WIDTH = 64
"""Channels of a head in Stable Diffusion 2.x, and in CLIP's towers."""
HEADS = 8
"""Heads at every level in Stable Diffusion 1.x."""

FOREIGN = {r"^label_emb\.": "class embeddings", r"\.transformer_blocks\.1\.": "transformers of depth 2"}
"""Layers that our U-Net lacks, by names of their weights."""

Weights = Mapping[str, Tensor]


def unet_arguments(weights: Weights, name: str) -> dict[str, Any]:
    """Infer arguments of ``UNet``.

    Heads cannot be seen: with convolutional projections there are 8, as in Stable Diffusion 1.x, with linear
    ones the head's width is 64, as in 2.x.

    Args:
        weights: By their names, without prefix.
        name: The file, for messages.

    Raises:
        ValueError: If the U-Net is of a kind that ours cannot be.
    """
    for pattern, what in FOREIGN.items():
        if found := [key for key in weights if re.search(pattern, key)]:
            raise ValueError(f"{name}: the U-Net has {what} ({found[0]}), expected none: ours has no such")
    levels = _levels(weights)
    if not levels or any(len(set(level)) != 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(
            f"{name}: the U-Net has levels of (channels, attends) {levels}, expected equal blocks in each "
            "level, and as many in all"
        )
    channels = [level[0][0] for level in levels]
    projection = next((w for key, w in weights.items() if key.endswith("proj_in.weight")), None)
    linear = projection is not None and projection.ndim == 2
    return {
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "attention": [level[0][1] for level in levels],
        "num_heads": [max(1, width // HEAD_WIDTH) for width in channels] if linear else HEADS,
        "norm_groups": 32,
        "linear_projection": linear,
    }


def unet_widths(weights: Weights, name: str) -> DenoiserDims:
    """Infer channels and widths of a U-Net.

    Args:
        weights: By their names, without prefix.
        name: The file, for messages.

    Raises:
        ValueError: If a weight that tells a size is missing.
    """
    sample, first = _rows(weights, "out.2.weight", name), "input_blocks.0.0.weight"
    _rows(weights, first, name)
    tokens = next((w.shape[1] for key, w in weights.items() if key.endswith("attn2.to_k.weight")), None)
    return DenoiserDims(sample, tokens=tokens, spatial=weights[first].shape[1] - sample)


def autoencoder_arguments(weights: Weights, name: str) -> dict[str, Any]:
    """Infer arguments of ``KLAutoencoder``.

    Args:
        weights: By their names, without prefix.
        name: The file, for messages.

    Raises:
        ValueError: If a weight that tells a size is missing.
    """
    levels = 1 + max(_numbers(weights, r"encoder\.down\.(\d+)\."), default=0)
    attention = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)]
    return {
        "latent_channels": _rows(weights, "encoder.conv_out.weight", name) // 2,
        "block_out_channels": [
            _rows(weights, f"encoder.down.{i}.block.0.conv1.weight", name) for i in range(levels)
        ],
        "layers_per_block": 1 + max(_numbers(weights, r"encoder\.down\.0\.block\.(\d+)\."), default=0),
        "norm_groups": 32,
        "image_channels": _rows(weights, "decoder.conv_out.weight", name),
        "attention": attention if any(attention) else None,
    }


def tower_arguments(weights: Weights, quick_gelu: bool, pad_id: int, name: str) -> dict[str, Any]:
    """Infer arguments of ``TextTower``; heads are 64 wide, as in all of CLIP's towers.

    Args:
        weights: By our names.
        quick_gelu: Which GELU the tower has.
        pad_id: Token that fills up short captions.
        name: The file, for messages.

    Raises:
        ValueError: If a weight that tells a size is missing.
    """
    width = _rows(weights, "final_layer_norm.weight", name)
    return {
        "width": width,
        "layers": 1 + max(_numbers(weights, r"encoder\.layers\.(\d+)\."), default=0),
        "heads": max(1, width // HEAD_WIDTH),
        "context_length": _rows(weights, "embeddings.position_embedding.weight", name),
        "mlp_ratio": _rows(weights, "encoder.layers.0.mlp.fc1.weight", name) / width,
        "quick_gelu": quick_gelu,
        "pad_id": pad_id,
    }


def _levels(weights: Weights) -> list[list[tuple[int, bool]]]:
    """List channels of the blocks on the way down, and whether they attend, level by level."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for i in count(1):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in weights:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in weights:
            channels = weights[f"{block}.0.in_layers.2.weight"].shape[0]
            levels[-1].append((channels, f"{block}.1.proj_in.weight" in weights))
        else:
            return levels if levels[0] else []
    return levels


def _numbers(weights: Weights, pattern: str) -> list[int]:
    return [int(found[1]) for key in weights if (found := re.match(pattern, key))]


def _rows(weights: Weights, key: str, name: str) -> int:
    if key not in weights:
        raise ValueError(f"{name}: weight {key} is missing")
    return weights[key].shape[0]
