"""The text tower in a CompVis file: transformers' names in Stable Diffusion 1.x, open_clip's in 2.x."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.interop.compvis_keys import below, names, text_modules
from ldm.interop.compvis_shapes import tower_arguments
from ldm.interop.model import Network
from ldm.interop.tokenizer import END, vocabulary
from ldm.interop.transformers import tower_weights

TRANSFORMERS, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
"""Prefixes of the names of its weights."""
NOT_TOWER = ("text_projection", "logit_scale", "attn_mask")
"""Weights of open_clip's text encoder outside of the tower."""
BLOCKS = "transformer.resblocks"

Weights = Mapping[str, Tensor]


def read_text(weights: Weights, name: str) -> Network:
    """Read a tower; of open_clip's the last block is left out, as Stable Diffusion 2.x does.

    Args:
        weights: All weights of the file.
        name: The file, for messages.

    Raises:
        ValueError: If there is no text tower.
    """
    old, new = below(weights, TRANSFORMERS), below(weights, OPEN_CLIP)
    if old:
        tower = tower_weights(old)
        return Network(tower_arguments(tower, True, vocabulary()[END], f"{name} ({TRANSFORMERS}*)"), tower)
    if new:
        tower = of_open_clip(new)
        return Network(tower_arguments(tower, False, 0, f"{name} ({OPEN_CLIP}*)"), tower)
    raise ValueError(
        f"{name}: the file has no text tower, expected {TRANSFORMERS}text_model.* or {OPEN_CLIP}*"
    )


def write_text_tower(text: Network) -> dict[str, Tensor]:
    """Name a tower's weights: as in 1.x with OpenAI's approximation of GELU, as in 2.x with the exact one."""
    if not text.arguments["quick_gelu"]:
        return {f"{OPEN_CLIP}{key}": value for key, value in to_open_clip(text).items()}
    positions = torch.arange(text.arguments["context_length"])[None]
    named = {**text.weights, "embeddings.position_ids": positions}
    return {f"{TRANSFORMERS}text_model.{key}": value for key, value in named.items()}


def of_open_clip(theirs: Weights) -> dict[str, Tensor]:
    """Rename open_clip's weights to ours, without the last block; unknown ones keep their names."""
    numbers = [int(key.split(".")[2]) for key in theirs if key.startswith(f"{BLOCKS}.")]
    layers = max(numbers, default=0)
    last = f"{BLOCKS}.{layers}."
    tower = {key: value for key, value in theirs.items() if key not in NOT_TOWER and not key.startswith(last)}
    known = names(tower, [(theirs, ours) for ours, theirs in text_modules(layers)])
    found = {}
    for key, value in tower.items():
        head, _, joint = key.partition(".attn.in_proj_")
        if joint:
            attention = f"encoder.layers.{head.rpartition('.')[2]}.self_attn"
            for letter, rows in zip("qkv", value.float().chunk(3), strict=True):
                found[f"{attention}.{letter}_proj.{joint}"] = rows
        elif key == "positional_embedding":
            found["embeddings.position_embedding.weight"] = value.float()
        else:
            found[known.get(key, key)] = value.float()
    return found


def to_open_clip(text: Network) -> dict[str, Tensor]:
    """Rename a tower's weights to open_clip's, with one more block that changes nothing.

    Readers leave the last block out, or run it: with projections of zero it adds zero to its input.
    """
    layers, width = text.arguments["layers"], text.arguments["width"]
    ours = text.weights
    found = {theirs: ours[key] for key, theirs in names(ours, text_modules(layers)).items()}
    found["positional_embedding"] = ours["embeddings.position_embedding.weight"]
    for i in range(layers):
        attention = f"encoder.layers.{i}.self_attn"
        for kind in ("weight", "bias"):
            joint = torch.cat([ours[f"{attention}.{letter}_proj.{kind}"] for letter in "qkv"])
            found[f"{BLOCKS}.{i}.attn.in_proj_{kind}"] = joint
    for key in [key for key in found if key.startswith(f"{BLOCKS}.0.")]:
        found[key.replace(f"{BLOCKS}.0.", f"{BLOCKS}.{layers}.")] = torch.zeros_like(found[key])
    found["text_projection"] = torch.eye(width)
    return found
