"""Every configuration instantiates, and reads what it needs of its shards, though none states it."""

import contextlib
import functools
import json

import pytest
import torch
import yaml
from tiny_runs import ROOT

from ldm import training
from ldm.nets.dit import DiT
from ldm.nets.unet import UNet
from ldm.runs.recipe import layers

READ = {  # fields and image size, as the configurations stated them before they were derived
    "autoencoder/kl-f8": ({"image"}, 256),
    **{f"autoencoder/kl-{f}": ({"image"}, 256) for f in ("f4", "f16", "f32")},
    "autoencoder/decoder": ({"image"}, 256),
    "clip/vit-b-16-siglip": ({"image", "text"}, 224),
    "clip/vit-b-32": ({"image", "text"}, 224),
    "conditions/inpainting": ({"latent", "image", "mask"}, 32),
    "conditions/layout": ({"latent", "layout"}, 32),
    "conditions/semantic": ({"latent", "label_map"}, 32),
    "conditions/super-resolution": ({"latent", "low_res"}, 32),
    "conditions/composite": ({"latent", "image", "text", "mask"}, 32),
    "demo/autoencoder": ({"image"}, 32),
    "demo/clip": ({"image", "text"}, 32),
    "demo/diffusion": ({"latent", "text"}, 32),
    "demo/digits": ({"image", "label"}, 8),
    "demo/pixels": ({"image", "text"}, 32),
    "emoji/autoencoder": ({"image"}, 64),
    "emoji/clip": ({"image", "text"}, 64),
    "emoji/perceptual": ({"image"}, 64),
    "emoji/squared-error": ({"image"}, 64),
    "cifar10/ddpm": ({"image"}, 32),
    "cifar10/edm": ({"image", "label"}, 32),
    "demo/dit": ({"latent", "text"}, 32),
    "demo/mean-flow": ({"image", "label"}, 8),
    "demo/fast/autoencoder": ({"image"}, 32),
    "demo/fast/clip": ({"image", "text"}, 32),
    "demo/fast/diffusion": ({"latent", "text"}, 32),
    "diffusion/dit": ({"latent", "text"}, 256),
    "diffusion/sd1": ({"latent", "text"}, 256),
    "diffusion/shapes": ({"latent", "text"}, 256),
    "kinds/satellite": ({"image", "label"}, 64),
    "kinds/xray": ({"image"}, 128),
    "kinds/xray-diffusion": ({"latent"}, 128),
    **{f"faces/ldm-4-{faces}": ({"latent"}, 256) for faces in ("ffhq", "celeba-hq")},
    **{
        f"imagenet/{model}": ({"latent", "label"}, 256)
        for model in ("dit-b-4", "dit-xl-2", "lightningdit-b-1", "ldm-4")
    },
    "imagenet/sr-dit-b-1": ({"latent", "label", "image"}, 256),
}
for side in (64, 128, 256):
    READ |= {
        f"own/{side}/autoencoder": ({"image"}, side),
        f"own/{side}/clip": ({"image", "text"}, side),
        f"own/{side}/diffusion": ({"latent", "text"}, side),
    }
ON_META = ("cifar10", "faces", "imagenet")
"""Folders of configurations whose denoisers are given no memory."""
SLOW = ("autoencoder/", "clip/", "diffusion/", "kinds/", "own/128/", "own/256/")


def built(path, tmp_path, chain, *more):
    options = [f"--run={tmp_path / 'run'}", "--wandb.mode=disabled", "--trainer.accelerator=cpu"]
    if path.parent.name == "diffusion" or path.match("configs/*/*/diffusion.yaml"):
        # its upstream runs take days: its widths follow those of tiny ones
        options.append(f"--model.latents.checkpoint={chain.runs / 'autoencoder'}")
        options.append(f"--model.conditioner.checkpoint={chain.runs / 'clip'}")
    if path.parent.name in ("imagenet", "faces") or path.stem == "xray-diffusion":
        options.append(f"--model.latents.checkpoint={chain.runs / 'autoencoder'}")
    with without_memory() if path.parent.name in ON_META else contextlib.nullcontext():
        return training.build(["--config", str(path), *options, *more])


@contextlib.contextmanager
def without_memory():
    """Give the weights of denoisers no memory."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (UNet, DiT):
            patch.setattr(kind, "__init__", on_meta(kind.__init__))
        yield


def on_meta(build):
    @functools.wraps(build)
    def built(*args, **kwargs):
        with torch.device("meta"):
            build(*args, **kwargs)

    return built


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ()) for name in READ]
)
def test_a_configuration_instantiates_and_derives_what_it_reads(tmp_path, chain, name):
    fields, size = READ[name]
    (tmp_path / "train.tar").touch()
    path = ROOT / "configs" / f"{name}.yaml"
    stated: dict[str, object] = {}
    for _, content in layers(path):
        stated |= content.get("data", {})
    cli = built(path, tmp_path, chain, f"--data.train={tmp_path / 'train.tar'}")
    config = yaml.safe_load(path.read_text())
    assert "class_path" in config.get("model", {}) or "base" in config
    assert cli.model.config["class_path"] == f"ldm.stages.{type(cli.model).__name__}"
    assert cli.config.trainer.max_steps % cli.config.trainer.val_check_interval == 0
    assert "fields" not in stated
    if "latent" in fields:
        manifest = {"autoencoder": {}, "image_size": size, "shards": {}}
        (tmp_path / "latents.json").write_text(json.dumps(manifest))
    cli.datamodule.derive(cli.model)
    assert set(cli.datamodule.fields) == fields and len(cli.datamodule.fields) == len(fields)
    assert cli.datamodule.image_size == size


def test_images_are_encoded_on_the_way_where_there_are_no_latents(tmp_path, chain):
    (tmp_path / "train.tar").touch()
    path = ROOT / "configs" / "demo" / "diffusion.yaml"
    cli = built(path, tmp_path, chain, f"--data.train={tmp_path / 'train.tar'}")
    cli.datamodule.derive(cli.model)
    assert (cli.datamodule.fields, cli.datamodule.image_size) == (("image", "text"), 32)


def test_every_configuration_is_listed():
    folder = ROOT / "configs"
    found = {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/**/[!_]*.yaml")}
    assert found == set(READ)
