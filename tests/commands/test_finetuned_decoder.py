"""A decoder that was fine-tuned for the same latents takes the place of the first one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_equal, error_of
from PIL import Image

from ldm import encode, fit, sample
from ldm.io.checkpoint import Checkpoint
from ldm.io.upstream import upstream_options
from ldm.latents.space import AutoencoderLatents, encoder_sha256
from ldm.nets.autoencoder import DECODER, ENCODER
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(chain, home, tmp_path_factory):
    """Run folder of the chain's autoencoder with another decoder."""
    run = tmp_path_factory.mktemp("tuned") / "autoencoder"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        more = [f"--run={run}", f"--weights={chain.runs / 'autoencoder'}", "--model.frozen=[encoder]"]
        assert fit.main(chain.arguments("autoencoder", *more, "--trainer.max_steps=2")) == 0
    return run


def half(run, names):
    weights = Checkpoint.open(run).state["state_dict"]
    return {k: v for k, v in weights.items() if k.startswith(tuple(f"net.{name}." for name in names))}


def drawn(run, out, *more):
    options = [f"--checkpoint={run}", "--prompt=a red ring", "--steps=1", "--device=cpu", f"--out={out}"]
    assert sample.main([*options, *more]) == 0
    return np.asarray(Image.open(next(Path(out).glob("*.png"))))


def test_it_shares_the_hash_of_encoder_and_scale_and_nothing_of_the_decoder(chain, tuned):
    first = chain.runs / "autoencoder"
    assert encoder_sha256(Checkpoint.open(tuned)) == encoder_sha256(Checkpoint.open(first))
    assert_equal(half(tuned, ENCODER), half(first, ENCODER), "encoder")
    pairs = zip(half(tuned, DECODER).values(), half(first, DECODER).values(), strict=True)
    assert any((one != other).any() for one, other in pairs)


def test_a_trained_diffusion_model_draws_through_it(chain, tuned, tmp_path):
    run = chain.runs / "diffusion"
    before = drawn(run, tmp_path / "before")
    after = drawn(run, tmp_path / "after", f"--upstream=autoencoder={tuned}")
    assert (before != after).any()
    stage, batch = load_stage(run, Diffusion), {"key": ["a"], "text": ["a red ring"]}
    stage.latents = AutoencoderLatents(str(tuned))  # the latents of the same noise, by the other decoder
    expected = stage.generate(batch, 0)
    with upstream_options([f"autoencoder={tuned}"]):
        found = load_stage(run, Diffusion).generate(batch, 0)
    assert torch.equal(found, expected)


def test_diffusion_trains_on_stored_latents_with_it_and_goes_on_with_it(chain, fresh, tuned, tmp_path):
    latents = f"--model.latents.checkpoint={tuned}"
    assert fit.main(fresh.arguments("diffusion", latents, "--trainer.max_steps=2")) == 0
    run = tmp_path / "continued"
    shutil.copytree(chain.runs / "diffusion", run)
    assert fit.main(fresh.arguments("diffusion", latents, f"--run={run}", "--trainer.max_steps=10")) == 0
    assert Checkpoint.open(run).progress.steps == 10
    assert Checkpoint.open(tuned).sha256 in Checkpoint.open(run).upstream.values()


def test_its_latents_are_added_to_those_that_are_there(chain, tuned, tmp_path, capsys):
    out = tmp_path / "latents"
    shutil.copytree(chain.latents, out)
    assert encode.main([*chain.encode(), f"--autoencoder={tuned}", f"--out={out}"]) == 0
    assert "holds latents of another" not in capsys.readouterr().err


def test_another_encoder_is_refused(chain, fresh, capsys):
    assert fit.main(fresh.arguments("autoencoder", "--trainer.max_steps=2")) == 0
    other = fresh.runs / "autoencoder"
    arguments = [f"--checkpoint={chain.runs / 'diffusion'}", "--prompt=x", "--steps=1", "--device=cpu"]
    line = error_of(capsys, [*arguments, f"--upstream=autoencoder={other}"], sample.main)
    assert "--upstream autoencoder: '" in line and "the same encoder and latent scale" in line
    latents = f"--model.latents.checkpoint={other}"
    line = error_of(capsys, fresh.arguments("diffusion", latents), fit.main)
    assert "latents were encoded by another autoencoder" in line
