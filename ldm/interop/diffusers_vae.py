"""The autoencoder of a folder of diffusers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ldm.interop.diffusers_configs import vae_arguments, vae_config
from ldm.interop.folders import ModelFolder
from ldm.interop.latents import complete, fold, of_factor, originals, scaling_factor, unfold
from ldm.interop.model import Latents, Network
from ldm.io.json_file import write_json
from ldm.io.weights import read_weights, write_weights

WEIGHTS = "diffusion_pytorch_model"
"""Prefixes of files of weights other than a text encoder's."""
UNFOLDED = "ldm_latents.safetensors"
"""File of an autoencoder's weights and statistics before folding."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in an autoencoder's attention in old folders."""


def read_vae(vae: ModelFolder) -> tuple[Network, Latents]:
    """Read the autoencoder; the statistics of an export of ours come back as they were."""
    arguments, latents = vae_arguments(vae.config, vae.config_name)
    weights = {_renamed(name): _squeezed(name, tensor) for name, tensor in vae.weights.items()}
    if not vae.config.get("use_quant_conv", True):
        weights = complete(weights, arguments["latent_channels"])
    network = Network(arguments, weights).float()
    if (original := vae.folder / UNFOLDED).is_file() and vae.config.get("scaling_factor") == 1.0:
        unfolded = unfold(network.weights, read_weights(original))
        return (Network(arguments, unfolded[0]), unfolded[1]) if unfolded else (network, latents)
    return network, latents


def _renamed(name: str) -> str:
    """Give a weight of an old folder its present name."""
    head, _, tail = name.rpartition(".")
    head, _, layer = head.rpartition(".")
    return f"{head}.{OLD_ATTENTION[layer]}.{tail}" if layer in OLD_ATTENTION else name


def _squeezed(name: str, tensor: Tensor) -> Tensor:
    """Make a matrix of a 1x1 convolution in an attention, as it was once."""
    return tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor


def write_vae(
    network: Network, latents: Latents, size: int | None, folder: Path, metadata: dict[str, str]
) -> None:
    """Write the autoencoder of a pipeline, whose latents are normalised by one factor: the rest is folded.

    Args:
        network: Of ``KLAutoencoder``.
        latents: How its latents are normalised.
        size: Side of the images that the pipeline draws; None if unknown.
        folder: Where to.
        metadata: Of the file of weights.
    """
    weights = network.weights
    if scaling_factor(latents) is None:
        write_weights(folder / UNFOLDED, originals(weights, latents), metadata)
        weights, latents = {**weights, **fold(weights, latents)}, of_factor(1.0, len(latents.mean))
    config = vae_config(network.arguments, latents)
    if size is not None:
        config["sample_size"] = size
    write_json(folder / "config.json", config)
    write_weights(folder / f"{WEIGHTS}.safetensors", weights, metadata)
