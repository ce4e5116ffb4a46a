"""The recipes for own images: what data.folder packs goes through all stages, and no path is given."""

import re

import pytest
import torch
from PIL import Image
from tiny_runs import ROOT

from data import folder
from ldm import encode, fit, sample
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.clip import CLIPModel
from ldm.nets.unet import UNet
from ldm.runs.recipe import merged
from ldm.types import Cond, DenoiserDims

STAGES = ("autoencoder", "clip", "diffusion")


def nets(size):
    """The networks of a recipe on the meta device, and its text tower's settings."""
    found = {stage: merged(f"own/{size}/{stage}")["model"]["init_args"] for stage in STAGES}
    text = found["clip"]["net"]["text_cfg"]
    with torch.device("meta"):
        autoencoder = KLAutoencoder(**found["autoencoder"]["net"])
        clip = CLIPModel(**found["clip"]["net"])
        dims = DenoiserDims(sample=autoencoder.latent_channels, tokens=text["width"])
        return autoencoder, clip, UNet(dims, **found["diffusion"]["denoiser"]["init_args"]), text


@pytest.mark.parametrize(("size", "side"), [(64, 16), (128, 32), (256, 32)])
def test_the_networks_of_a_recipe_fit_its_images(size, side):
    autoencoder, clip, unet, text = nets(size)
    with torch.device("meta"):
        image = torch.empty(2, 3, size, size)
        latent = autoencoder.encode(image).mean
        assert latent.shape == (2, 4, side, side)
        assert autoencoder.decode(latent).shape == image.shape
        tokens = torch.zeros(2, text["context_length"], dtype=torch.int64)
        assert clip.model.encode_image(image).shape == clip.model.encode_text(tokens).shape
        cond = Cond(tokens=torch.empty(2, text["context_length"], text["width"]))
        assert unet(latent, torch.zeros(2), cond).shape == latent.shape
    assert side % unet.factor == 0


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_stages_of_a_recipe_name_each_other(size):
    found = {stage: merged(f"own/{size}/{stage}") for stage in STAGES}
    assert {found[stage]["data"]["image_size"] for stage in STAGES[:2]} == {size}
    assert {stage: found[stage]["run"] for stage in STAGES} == {
        stage: f"runs/own/{size}/{stage}" for stage in STAGES
    }
    init = found["diffusion"]["model"]["init_args"]
    assert init["latents"]["init_args"]["checkpoint"] == found["autoencoder"]["run"]
    assert init["conditioner"]["init_args"]["checkpoint"] == found["clip"]["run"]
    head = (ROOT / "configs" / "own" / str(size) / "diffusion.yaml").read_text().splitlines()[0]
    latents = found["diffusion"]["data"]["train"]
    assert f"--autoencoder {found['autoencoder']['run']} " in head
    assert head.endswith(
        f'--shards "{found["autoencoder"]["data"]["train"]}" --out {latents.rpartition("/")[0]}'
    )


@pytest.mark.slow
def test_a_folder_of_images_goes_through_all_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "photos").mkdir()
    for n in range(12):
        Image.new("RGB", (80 + n, 120 - n), (20 * n, 40, 250 - 20 * n)).save(f"photos/{n}.JPG")
        (tmp_path / "photos" / f"{n}.txt").write_text(f"photo number {n}")
    folder.main(["--images", "photos", "--out", "shards/own", "--val-fraction", "0.3"])
    following = re.search(r"next: python -m ldm\.fit (.+)", capsys.readouterr().out)
    quick = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu"]
    quick += ["--data.batch_size=4", "--sample_grid.num=2", "--wandb.mode=disabled"]
    assert fit.main([*following[1].split(), *quick]) == 0
    assert fit.main(["--config", "own/64/clip", *quick]) == 0
    first = (ROOT / "configs" / "own" / "64" / "diffusion.yaml").read_text().splitlines()[0]
    assert encode.main(first.replace('"', "").split()[4:]) == 0
    assert fit.main(["--config", "own/64/diffusion", "--model.sampler.num_steps=2", *quick]) == 0
    drawn = ["--checkpoint", "runs/own/64/diffusion", "--prompt", "photo number 3", "--steps", "2"]
    assert sample.main([*drawn, "--out", "samples"]) == 0
    assert Image.open("samples/000000.png").size == (64, 64)
