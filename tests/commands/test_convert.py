"""A trained chain through the real commands: to diffusers, drawn there, back, drawn here, trained on."""

import contextlib
import json

import pytest
import torch
from comparing import error_of
from PIL import Image
from tiny_shards import write_shards
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import export
from ldm import convert, encode, fit, sample
from ldm.io.checkpoint import Checkpoint
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

CAPTIONS = ["a large red ring", "two blue squares", ""]


def run(*arguments):
    return convert.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def there(chain, home, tmp_path_factory):
    """The chain's diffusion run as a folder of diffusers."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("there") / "pipeline"
    with contextlib.chdir(home):
        assert run("to-diffusers", f"--run={chain.runs / 'diffusion'}", f"--out={folder}") == 0
    return folder


@pytest.mark.slow
def test_an_exported_run_draws_the_same_images_elsewhere(chain, there):
    from diffusers import DiffusionPipeline

    stage = load_stage(str(chain.runs / "diffusion"), Diffusion)
    pipeline = DiffusionPipeline.from_pretrained(there, local_files_only=True)
    x = export.noise(stage, CAPTIONS, seed=3)
    ours = export.draw_ours(stage, CAPTIONS, 5, 3.0, seed=3).images
    theirs = export.draw_theirs(pipeline, CAPTIONS, 5, 3.0, x).images
    assert ours.shape == theirs.shape == (3, 3, 32, 32)
    assert (ours - theirs).abs().max() < 1 / 255
    assert (ours[0] - ours[1]).abs().max() > 10 / 255
    assert max(export.errors(stage, pipeline, CAPTIONS, x).values()) < 1e-5
    record = json.loads((there / "ldm.json").read_text())
    assert record["weights"] == "ema" and record["sha256"] == Checkpoint.open(chain.runs / "diffusion").sha256


@pytest.mark.slow
def test_a_reimported_run_draws_the_same_and_can_be_trained_further(chain, there, fresh, tmp_path):
    back = fresh.runs / "imported"
    assert run("from-diffusers", f"--folder={there}", f"--out={back}") == 0
    for name in ("autoencoder", "diffusion"):
        before, after = (Checkpoint.open(runs / name).state["state_dict"] for runs in (chain.runs, back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    options = ["--prompt=a large red ring", "--steps=3", "--guidance=2", "--device=cpu"]
    for runs, out in ((chain.runs, tmp_path / "a"), (back, tmp_path / "b")):
        assert sample.main([f"--checkpoint={runs / 'diffusion'}", f"--out={out}", *options]) == 0
    assert torch.equal(*(pil_to_tensor(Image.open(tmp_path / name / "000000.png")) for name in "ab"))
    model = [f"--config={back / 'model.yaml'}", f"--weights={back / 'diffusion'}"]
    images = [f"--data.train={fresh.shards / 'train-000000.tar'}"]
    assert fit.main(fresh.arguments("diffusion", *model, *images, "--trainer.max_steps=1")) == 0


def test_unsupported_features_end_in_one_clear_line(chain, fresh, capsys, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    line = error_of(capsys, ["to-diffusers", f"--run={chain.runs / 'clip'}", out], convert.main)
    assert "is of stage 'clip', expected stage 'diffusion'" in line
    narrow = ["--model.denoiser.block_out_channels=[16,32,32]", "--sample_grid.num=1"]
    assert fit.main(fresh.arguments("pixels", "--trainer.max_steps=1", *narrow)) == 0
    line = error_of(capsys, ["to-diffusers", f"--run={fresh.runs / 'pixels'}", out], convert.main)
    assert "model.latents is Pixels, expected AutoencoderLatents" in line
    line = error_of(capsys, ["from-diffusers", "--folder=nowhere", out], convert.main)
    assert "'nowhere' is no folder, expected a pipeline of diffusers" in line
    assert not (tmp_path / "out").exists()


def test_a_single_file_comes_back_bit_for_bit(chain, fresh, tmp_path, capsys):
    file, back = tmp_path / "x.safetensors", fresh.runs / "imported"
    assert run("to-compvis", f"--run={chain.runs / 'diffusion'}", f"--out={file}") == 0
    assert run("from-compvis", f"--file={file}", f"--out={back}") == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {file}", f"wrote {back / 'diffusion'}"]
    for name in ("autoencoder", "diffusion"):
        before, after = (Checkpoint.open(runs / name).state["state_dict"] for runs in (chain.runs, back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    line = error_of(
        capsys, ["from-compvis", "--file=nowhere.ckpt", f"--out={tmp_path / 'out'}"], convert.main
    )
    assert "weights 'nowhere.ckpt' do not exist" in line
    command = ["from-compvis", f"--file={file}", f"--out={tmp_path / 'out'}", "--weights=both"]
    assert "weights" in error_of(capsys, command, convert.main)


def test_an_autoencoder_alone_encodes_shards(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    levels = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 3}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**levels, **kinds, shift_factor=0.1).save_pretrained(tmp_path / "theirs")
    vae = tmp_path / "vae"
    assert run("from-diffusers", f"--folder={tmp_path / 'theirs'}", f"--out={vae}") == 0
    assert capsys.readouterr().out == f"wrote {vae}\n"
    shards, out = write_shards(tmp_path / "shards", [2]), tmp_path / "latents"
    assert encode.main([f"--autoencoder={vae}", f"--shards={shards}", f"--out={out}", "--size=8"]) == 0
    assert (out / "train-000000.tar").is_file()
