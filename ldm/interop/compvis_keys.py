"""Names of weights in CompVis's single files, derived from the structure that both sides share.

Their U-Net numbers its blocks through, whatever they are: a convolution, a ResNet block with its transformer,
a change of size. Their autoencoder counts the decoder's levels from the finest. What is inside of a block is
the same everywhere, so pairs of module names are enough; parameters keep their last name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

Pairs = Iterator[tuple[str, str]]
"""Our name of a module and theirs."""

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
SEGMENT = (
    r"(?<=put_blocks)\d+(?=\d)|\d|(?:in|out)put_blocks|middle_block|time_embed|(?:in|emb|out)_layers|"
    r"skip_connection|transformer_blocks|attn\d|norm\d?|to_(?:[qkv]|out)|proj_in|proj_out|proj|ff|net|op|conv|"
    r"out|weight|bias"
)
"""A segment of the name of a U-Net's weight; in consecutively numbered blocks also the last digit."""
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_modules(arguments: Mapping[str, Any]) -> Pairs:
    """Pair the modules of a U-Net.

    Args:
        arguments: Those of ``UNet``; only depth, layers and attention matter.
    """
    attention, layers = arguments["attention"], arguments["layers_per_block"]
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    yield from _down(attention, layers)
    yield from _inside("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _inside("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    yield from _up(attention[::-1], layers + 1)


def autoencoder_modules(arguments: Mapping[str, Any]) -> Pairs:
    """Pair the modules of an autoencoder.

    Args:
        arguments: Those of ``KLAutoencoder``; only depth, layers and attention matter.
    """
    levels, layers = len(arguments["block_out_channels"]), arguments["layers_per_block"]
    attends = arguments.get("attention") or [False] * levels
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for half in ("encoder", "decoder"):
        yield from ((f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out"))
        yield f"{half}.conv_norm_out", f"{half}.norm_out"
        yield from _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for i in (0, 1):
            yield from _inside(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", VAE_RESNET)
    for i in range(levels):
        down, up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"
        for j in range(layers):
            yield from _inside(f"encoder.down_blocks.{i}.resnets.{j}", f"{down}.block.{j}", VAE_RESNET)
        for j in range(layers + 1):
            yield from _inside(f"decoder.up_blocks.{i}.resnets.{j}", f"{up}.block.{j}", VAE_RESNET)
        for j in range(layers if attends[i] else 0):
            ours = f"encoder.down_blocks.{i}.attentions.{j}"
            yield from _inside(ours, f"{down}.attn.{j}", VAE_ATTENTION)
        for j in range(layers + 1 if attends[levels - 1 - i] else 0):
            yield from _inside(f"decoder.up_blocks.{i}.attentions.{j}", f"{up}.attn.{j}", VAE_ATTENTION)
        if i + 1 < levels:
            yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"{down}.downsample.conv"
            yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"{up}.upsample.conv"


def text_modules(layers: int) -> Pairs:
    """Pair the modules of a text tower with open_clip's, but for the joint projections of attention.

    Args:
        layers: Number of layers.
    """
    yield from (("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final"))
    for i in range(layers):
        yield from _inside(f"encoder.layers.{i}", f"transformer.resblocks.{i}", TEXT_LAYER)


def names(ours: Iterable[str], modules: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Give parameters their names.

    Args:
        ours: Our names.
        modules: Pairs of module names, none inside another.

    Returns:
        Their name of each of ours that belongs to one of the modules.
    """
    known = dict(modules)
    found = {}
    for name in ours:
        for end in (i for i, letter in enumerate(name) if letter == "."):
            if name[:end] in known:
                found[name] = known[name[:end]] + name[end:]
    return found


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def dotted(name: str) -> str:
    """Put the dots back into the name of a U-Net's weight: averages (model_ema.*) are named without them."""
    segments = re.findall(SEGMENT, name)
    return ".".join(segments) if "".join(segments) == name else name


def _inside(ours: str, theirs: str, modules: Mapping[str, str]) -> Pairs:
    return ((f"{ours}.{mine}", f"{theirs}.{other}") for mine, other in modules.items())


def _down(attention: list[bool], layers: int) -> Pairs:
    number = 1
    for i, attends in enumerate(attention):
        for j in range(layers):
            yield from _inside(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0", UNET_RESNET)
            if attends:
                yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if i + 1 < len(attention):
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _up(attention: list[bool], layers: int) -> Pairs:
    for i, attends in enumerate(attention):
        for j in range(layers):
            block = f"output_blocks.{i * layers + j}"
            yield from _inside(f"up_blocks.{i}.resnets.{j}", f"{block}.0", UNET_RESNET)
            if attends:
                yield f"up_blocks.{i}.attentions.{j}", f"{block}.1"
        if i + 1 < len(attention):
            yield f"up_blocks.{i}.upsamplers.0.conv", f"{block}.{2 if attends else 1}.conv"
