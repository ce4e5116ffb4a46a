"""The config.json of a diffusers U-Net and autoencoder, from and to arguments of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ldm.interop.latents import of_factor, of_statistics, scaling_factor, shortest
from ldm.interop.model import Latents

UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
"""Settings of a ``UNet2DConditionModel`` that our U-Net has at one value; also its defaults."""
UNET_FREE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "sample_size": None,
    "dropout": 0.0,
    "upcast_attention": False,
    "addition_embed_type_num_heads": 64,
}
"""Settings that may have any value, with diffusers' defaults: arguments, and what changes no image."""
VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
}
"""The same of an ``AutoencoderKL``."""
VAE_FREE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "force_upcast": True,
}
VAE_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
"""Types of an autoencoder's levels, without attention and with it."""
ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
"""Whether a level on the way down has transformers, by its type; the types on the way up mirror it."""


def unet_arguments(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read a U-Net's config.json.

    Args:
        config: Its contents.
        name: The file, for messages.

    Returns:
        Arguments of ``UNet``, without the widths.

    Raises:
        ValueError: If our U-Net cannot be that; the message names field and value.
    """
    config = checked(config, "UNet2DConditionModel", UNET_FREE, UNET_FIXED, name)
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    for kind in down:
        if kind not in ATTENDS:
            raise ValueError(f"{name}: down_block_types has {kind}, expected {' or '.join(ATTENDS)}")
    _expect(name, "up_block_types", up, [kind.replace("Down", "Up") for kind in reversed(down)])
    heads = config["attention_head_dim"]  # by an old mistake of theirs it is the number of heads
    return {
        "block_out_channels": list(config["block_out_channels"]),
        "layers_per_block": _one(config["layers_per_block"], "layers_per_block", name),
        "attention": [ATTENDS[kind] for kind in down],
        "num_heads": heads if isinstance(heads, int) else list(heads),
        "norm_groups": config["norm_num_groups"],
        "linear_projection": config["use_linear_projection"],
    }


def unet_config(arguments: Mapping[str, Any], channels: int, inputs: int, tokens: int) -> dict[str, Any]:
    """Write a U-Net's config.json.

    Args:
        arguments: All arguments of ``UNet`` but the widths.
        channels: C of the latent.
        inputs: Channels of the input, C or more.
        tokens: D of the text tower.
    """
    down = [_kind("Down", attends) for attends in arguments["attention"]]
    heads = arguments["num_heads"]
    return {
        "_class_name": "UNet2DConditionModel",
        **UNET_FIXED,
        "in_channels": inputs,
        "out_channels": channels,
        "block_out_channels": list(arguments["block_out_channels"]),
        "down_block_types": down,
        "up_block_types": [_kind("Up", attends) for attends in reversed(arguments["attention"])],
        "layers_per_block": arguments["layers_per_block"],
        "norm_num_groups": arguments["norm_groups"],
        "cross_attention_dim": tokens,
        "attention_head_dim": heads if isinstance(heads, int) else list(heads),
        "use_linear_projection": arguments["linear_projection"],
    }


def vae_arguments(config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], Latents]:
    """Read an autoencoder's config.json.

    Returns:
        Arguments of ``KLAutoencoder``, and how latents are normalised: by a factor, and by a shift for all
        channels or mean and deviation of each.

    Raises:
        ValueError: If our autoencoder cannot be that; the message names field and value.
    """
    config = checked(config, "AutoencoderKL", VAE_FREE, VAE_FIXED, name)
    attention = [kind == VAE_LEVELS["down_block_types"][1] for kind in config["down_block_types"]]
    for field, kinds in _vae_levels(attention).items():
        _expect(name, field, list(config[field]), kinds)
    _expect(name, "out_channels", config["out_channels"], config["in_channels"])
    _expect(name, "use_post_quant_conv", config["use_post_quant_conv"], config["use_quant_conv"])
    arguments = {
        "latent_channels": config["latent_channels"],
        "block_out_channels": list(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "image_channels": config["in_channels"],
        "attention": attention if any(attention) else None,
    }
    return arguments, _latents(config, name)


def check_unshifted(config: Mapping[str, Any], name: str) -> None:
    """Check that latents are normalised by a factor alone: pipelines of Stable Diffusion use nothing else.

    Raises:
        ValueError: If they are not.
    """
    for field in ("shift_factor", "latents_mean", "latents_std"):
        _expect(name, field, config.get(field), None)


def _latents(config: Mapping[str, Any], name: str) -> Latents:
    factor, shift, channels = config["scaling_factor"], config["shift_factor"], config["latent_channels"]
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None and std is None:
        return replace(of_factor(factor, channels), mean=torch.full((channels,), float(shift or 0)))
    if shift or mean is None or std is None or not len(mean) == len(std) == channels:
        raise ValueError(
            f"{name}: expected {channels} numbers in latents_mean and latents_std, and no shift_factor"
        )
    return of_statistics(mean, [each / factor for each in std])


def vae_config(arguments: Mapping[str, Any], latents: Latents, has_quant_conv: bool = True) -> dict[str, Any]:
    """Write an autoencoder's config.json.

    Args:
        arguments: All arguments of ``KLAutoencoder``.
        latents: How its latents are normalised: by a factor, a shift and a factor, or channel by channel.
        has_quant_conv: Whether the two 1x1 convolutions around the latent are among its weights.
    """
    channels = list(arguments["block_out_channels"])
    attention = arguments.get("attention") or [False] * len(channels)
    return {
        "_class_name": "AutoencoderKL",
        **VAE_FIXED,
        **_vae_levels(attention),
        **_normalisation(latents),
        "in_channels": arguments["image_channels"] or 3,
        "out_channels": arguments["image_channels"] or 3,
        "block_out_channels": channels,
        "layers_per_block": arguments["layers_per_block"],
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": arguments["norm_groups"],
        "use_quant_conv": has_quant_conv,
        "use_post_quant_conv": has_quant_conv,
        "force_upcast": True,  # nobody has tried these weights in float16
    }


def _normalisation(latents: Latents) -> dict[str, Any]:
    """Say how latents are normalised in as few fields as do."""
    unshifted = replace(latents, mean=torch.zeros_like(latents.mean))
    factor, shift = scaling_factor(unshifted), latents.mean[0].item()
    if factor is None or not latents.mean.eq(shift).all():
        statistics = {"latents_mean": latents.mean.tolist(), "latents_std": latents.std.tolist()}
        return {"scaling_factor": 1.0, **statistics}
    return {"scaling_factor": factor, **({"shift_factor": shortest(shift)} if shift else {})}


def _vae_levels(attention: Sequence[bool]) -> dict[str, list[str]]:
    kinds = {"down_block_types": attention, "up_block_types": attention[::-1]}
    return {field: [VAE_LEVELS[field][attends] for attends in found] for field, found in kinds.items()}


def _kind(way: str, attends: bool) -> str:
    return f"CrossAttn{way}Block2D" if attends else f"{way}Block2D"


def checked(
    config: Mapping[str, Any], kind: str, free: Mapping[str, Any], fixed: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Complete a config.json by diffusers' defaults, once all that it fixes is as we have it."""
    _expect(name, "_class_name", config.get("_class_name", kind), kind)
    for field, value in config.items():
        if field in fixed:
            same = isinstance(value, Sequence) and bool(value) and all(v == fixed[field] for v in value)
            _expect(name, field, fixed[field] if same else value, fixed[field])
        elif field not in free and not field.startswith("_") and value is not None:
            raise ValueError(f"{name}: {field} is {value}, expected no such field: it is not known here")
    return {**free, **config}


def _one(value: Any, field: str, name: str) -> Any:
    values = set(value) if isinstance(value, Sequence) else {value}
    if len(values) > 1:
        raise ValueError(f"{name}: {field} is {value}, expected the same for all levels")
    return values.pop()


def _expect(name: str, field: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{name}: {field} is {found}, expected {expected}: ours has no other")
