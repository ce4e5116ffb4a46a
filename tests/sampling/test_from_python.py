"""A diffusion stage of a notebook: built in Python, trained by a plain Trainer, drawn with by the command."""

from functools import partial

import lightning as L
import pytest
import torch
from comparing import error_of
from own_denoiser import Affine
from PIL import Image
from tiny_stage import loader

from ldm import sample
from ldm.conditioners import Unconditional
from ldm.diffusion.samplers import DDIM
from ldm.latents import Pixels
from ldm.stages import Diffusion
from ldm.stages.load import load_stage


def train(folder, denoiser):
    """Train one step; return the stage, a run folder, and the checkpoint that the Trainer writes itself."""
    torch.manual_seed(0)
    stage = Diffusion(Pixels(), Unconditional(), denoiser, sampler=DDIM(num_steps=2))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(default_root_dir=folder, accelerator="cpu", max_steps=1, max_epochs=1, **quiet)
    run.fit(stage, loader(4, 4, size=8))
    run.save_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    return stage, [folder / "run", next((folder / "checkpoints").glob("epoch=*.ckpt"))]


@pytest.mark.parametrize("denoiser", [Affine, partial(Affine, bias=0.5)])
def test_the_command_draws_with_it(tmp_path, denoiser):
    stage, checkpoints = train(tmp_path, denoiser)
    expected = stage.eval().generate({"key": ["image/0", "image/1"]}, seed=3)
    for number, checkpoint in enumerate(checkpoints):
        again = load_stage(checkpoint, Diffusion)
        assert torch.equal(again.generate({"key": ["image/0", "image/1"]}, seed=3), expected)
        out = tmp_path / f"out-{number}"
        arguments = [f"--checkpoint={checkpoint}", "--num=2", "--seed=3", f"--out={out}", "--device=cpu"]
        assert sample.main(arguments) == 0
        assert Image.open(out / "000001.png").size == (8, 8)


def test_an_object_that_a_checkpoint_cannot_name_is_reported_in_training_and_in_sampling(tmp_path, capsys):
    with pytest.warns(UserWarning, match="no command can read them: model.denoiser"):
        stage, (run, _) = train(tmp_path, lambda dims: Affine(dims))
    line = error_of(capsys, [f"--checkpoint={run}", "--num=1", "--device=cpu"], sample.main)
    assert "its stage was trained in Python with a part that has no import path, such as a function" in line
    # in Python it is drawn with all the same
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    again = Diffusion(Pixels(), Unconditional(), lambda dims: Affine(dims), sampler=DDIM(num_steps=2))
    again.load_trained(state)
    batch = {"key": ["a"]}
    assert torch.equal(again.eval().generate(batch, 0), stage.eval().generate(batch, 0))


def test_numbers_that_overflow_are_no_black_images(tmp_path, capsys):
    _, (run, _) = train(tmp_path, partial(Affine, bias=float("inf")))
    out = tmp_path / "out"
    line = error_of(capsys, [f"--checkpoint={run}", "--num=1", f"--out={out}", "--device=cpu"], sample.main)
    assert "1 of 1 images are not finite, the first is that of 'image/0'" in line
    assert not list(out.glob("*.png"))
