"""The autoencoders of Rombach et al. 2021 by their recipes: graph, parameters and latents as published."""

import pytest
import torch
from tiny_runs import ROOT

from ldm.interop.diffusers_configs import vae_config
from ldm.interop.latents import of_factor
from ldm.interop.model import arguments
from ldm.nets.autoencoder import KLAutoencoder
from ldm.runs.recipe import merged

diffusers = pytest.importorskip("diffusers")

PUBLISHED = {
    "kl-f4": (3, 64, [1, 2, 4], [], "rFID 0.27, PSNR 27.53, PSIM 0.55"),
    "kl-f8": (4, 32, [1, 2, 4, 4], [], "rFID 0.90, PSNR 24.19, PSIM 1.02"),
    "kl-f16": (16, 16, [1, 1, 2, 2, 4], [16], "rFID 0.87, PSNR 24.08, PSIM 1.07"),
    "kl-f32": (64, 8, [1, 1, 2, 2, 4, 4], [16, 8], "rFID 2.04, PSNR 22.27, PSIM 1.41"),
}
"""z_channels, side of the latent, ch_mult, attn_resolutions as CompVis configures them, and the results."""


def net_of(name):
    found = merged(f"autoencoder/{name}")["model"]["init_args"]["net"]
    return arguments(KLAutoencoder, found if isinstance(found, dict) else {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_graph_parameters_and_latents_are_the_published_ones(name):
    channels, side, multiples, resolutions, results = PUBLISHED[name]
    ours = net_of(name)
    assert ours["block_out_channels"] == [128 * m for m in multiples] or name == "kl-f8"
    attends = [256 // 2**i in resolutions for i in range(len(multiples))]
    assert (ours["attention"] or [False] * len(multiples)) == attends and ours["layers_per_block"] == 2
    theirs = vae_config(
        {**ours, "block_out_channels": [128 * m for m in multiples]}, of_factor(1.0, channels)
    )
    with torch.device("meta"):
        net, vae = KLAutoencoder(**ours), diffusers.AutoencoderKL.from_config(theirs)
        image = torch.empty(1, 3, 256, 256)
        latent = net.encode(image).mean
        assert latent.shape == (1, channels, side, side) and net.decode(latent).shape == image.shape
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in vae.state_dict().items()}
    head = (ROOT / "configs" / "autoencoder" / f"{name}.yaml").read_text()
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in head and results in head
    assert f"latents of {channels}x{side}x{side} for" in head


def test_a_decoder_is_tuned_for_latents_that_stay():
    found = merged("autoencoder/decoder")["model"]["init_args"]
    assert found["frozen"] == ["encoder"] and found["reconstruction"] == "L2"
    assert [(each["class_path"], each["init_args"]["weight"]) for each in found["losses"]] == [("LPIPS", 0.1)]
