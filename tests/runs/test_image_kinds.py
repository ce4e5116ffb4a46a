"""Runs on images of one channel of 16 bits and of four channels of 8, from shards to files."""

import io
import json

import numpy as np
import pytest
from comparing import error_of, state
from PIL import Image
from tiny_shards import write_tar

from ldm import encode, evaluate, fit, sample
from ldm.io.images import to_bytes
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import ImageKind

QUICK = {
    "wandb.mode": "disabled",
    "data.batch_size": 8,
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "sample_grid.num": 4,
    "data.image_size": 16,
}
DIFFUSION = """
base: demo/_diffusion
model:
  init_args:
    conditioner: Unconditional
    denoiser: {init_args: {block_out_channels: [16, 32], transformers: false, norm_groups: 8}}
    sampler: {init_args: {num_steps: 2}}
"""
SMALL = {"model.net.block_out_channels": "[8,16]"}
GREY16 = {"data.image.channels": 1, "data.image.bits": 16}


def options(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def fitted(config, run, shards, more):
    """The command line of ldm.fit."""
    train = f"{shards}/train-000000.tar"
    settings = {"run": run, "data.train": train, "data.val": train, **QUICK, **more}
    return ["--config", str(config), *options(settings)]


def write_shard(folder, channels, bits):
    """24 noisy images with a bright square, in files of their kind."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(24):
        pixels = rng.integers(0, 2**bits // 2, (16, 16, channels))
        pixels[number % 8 : number % 8 + 6, 4:10] += 2**bits // 2
        pixels = pixels.astype(np.uint8 if bits == 8 else np.uint16)
        out = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(out, "PNG")
        files.append((f"{number:04d}.png", out.getvalue()))
    write_tar(folder / "train-000000.tar", files)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A configuration of diffusion without conditions."""
    path = tmp_path_factory.mktemp("config") / "diffusion.yaml"
    path.write_text(DIFFUSION)
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Shards of grey images of 16 bits, and an autoencoder that was trained on them."""
    folder = write_shard(tmp_path_factory.mktemp("grey"), 1, 16)
    assert fit.main(fitted("demo/autoencoder", folder / "autoencoder", folder, {**SMALL, **GREY16})) == 0
    return folder


def test_an_autoencoder_takes_its_channels_from_the_declaration_and_records_the_kind(grey, capsys):
    found = state(grey / "autoencoder")
    assert found["config"]["init_args"]["net"]["init_args"]["image_channels"] == 1
    assert found["image"] == {"channels": 1, "bits": 16, "convert": None}
    stage = load_stage(grey / "autoencoder", Autoencoder)
    assert stage.image_kind == ImageKind(1, 16) and stage.net.encoder.conv_in.in_channels == 1
    with Image.open(min((grey / "autoencoder" / "images").glob("*.png"))) as grid:
        assert grid.mode == "RGB"
    other = {**SMALL, **GREY16, "data.image.bits": 8, "data.image.convert": "any", "trainer.max_steps": 6}
    error = error_of(capsys, fitted("demo/autoencoder", grey / "autoencoder", grey, other))
    assert "data.image: the checkpoint was trained on images of 1 channel of 16 bits, found" in error


@pytest.mark.slow
def test_latent_diffusion_of_grey_images_of_16_bits_writes_such_files(grey, diffusion, tmp_path, capsys):
    latents = tmp_path / "latents"
    asked = [f"--autoencoder={grey / 'autoencoder'}", f"--shards={grey}/train-000000.tar"]
    assert encode.main([*asked, f"--out={latents}", "--keep-images", "--flip"]) == 0
    assert json.loads((latents / "latents.json").read_text())["image"]["bits"] == 16
    more = {"model.latents": "AutoencoderLatents", "model.latents.checkpoint": grey / "autoencoder"}
    more["data.val"] = f"{grey}/train-000000.tar"
    run = tmp_path / "diffusion"
    wrong = fitted(diffusion, run, latents, {**more, "data.image.channels": 1})
    assert "data.image: got 1 channel of 8 bits, but the autoencoder" in error_of(capsys, wrong)
    assert fit.main(fitted(diffusion, run, latents, more)) == 0
    assert load_stage(run, Diffusion).image_kind == ImageKind(1, 16)
    out = tmp_path / "samples"
    assert sample.main([f"--checkpoint={run}", "--num=2", "--steps=2", f"--out={out}"]) == 0
    with Image.open(out / "000000.png") as drawn, Image.open(out / "grid.png") as overview:
        assert (drawn.mode, drawn.size, overview.mode) == ("I;16", (16, 16), "RGB")
        first = np.array(drawn)
    assert len(np.unique(first)) > 200  # more than 8 bits would tell apart
    again = ["--strength=0.5", f"--image={out}/000000.png", f"--out={tmp_path / 'again'}"]
    assert sample.main([f"--checkpoint={run}", "--num=1", "--steps=2", *again]) == 0
    measured = [f"--checkpoint={grey / 'autoencoder'}", f"--data={grey}/train-000000.tar", "--save-images"]
    assert evaluate.main([*measured, f"--out={tmp_path / 'evaluation'}"]) == 0
    saved = np.load(next((tmp_path / "evaluation").glob("*.npz")))["arr_0"]
    assert saved.shape == (24, 16, 16, 1) and saved.dtype == np.uint16


@pytest.mark.slow
def test_diffusion_of_four_channels_in_pixels(diffusion, tmp_path):
    shards, run, out = write_shard(tmp_path / "shards", 4, 8), tmp_path / "pixels", tmp_path / "samples"
    assert (
        fit.main(fitted(diffusion, run, shards, {"model.latents": "Pixels", "data.image.channels": 4})) == 0
    )
    stage = load_stage(run, Diffusion)
    assert stage.image_kind == ImageKind(4) and stage.latents.channels == 4
    assert sample.main([f"--checkpoint={run}", "--num=2", "--steps=2", f"--out={out}"]) == 0
    with Image.open(out / "000000.png") as drawn:
        assert drawn.mode == "RGBA" and drawn.text["prompt"] == "image"
        found = np.array(drawn)
    stage.sampler.num_steps = 2
    expected = to_bytes(stage.generate({"key": ["image/0", "image/1"]}, 0))[0]
    assert np.array_equal(found, expected.permute(1, 2, 0))


def test_images_of_another_kind_are_refused_before_training(grey, tmp_path, capsys):
    one = {**SMALL, "data.image.channels": 1}
    error = error_of(capsys, fitted("demo/autoencoder", tmp_path / "run", grey, one))
    assert (
        "has 16 bits, expected 1 channel of 8 bits (data.image); data.image.convert any rounds to 8" in error
    )
