"""A stage in a notebook: a plain Trainer, a DataLoader, no configuration; commands read its checkpoint."""

import warnings

import lightning as L
import pytest
import torch
from own_denoiser import Affine
from tiny_shards import sample, write_tar
from tiny_stage import loader

from ldm import encode
from ldm.conditioners import Unconditional
from ldm.latents.space import AutoencoderLatents, Pixels
from ldm.losses import L1
from ldm.nets.autoencoder import KLAutoencoder
from ldm.optim.recipes import AdamW
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage


def train(folder, stage, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=2, **quiet, **options)
    run.fit(stage, loader(32, 4, size=16), loader(8, 4, size=16))
    return run


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    net = KLAutoencoder(latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    stage = Autoencoder(net, kl_weight=1e-2, optimizer=AdamW(1e-3, warmup=1))
    run = train(tmp_path, stage)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run.save_checkpoint(path)
    return stage, path


def test_the_checkpoint_rebuilds_the_stage(trained):
    stage, path = trained
    saved = torch.load(path, weights_only=True)
    assert saved["progress"] == {"steps": 16, "samples": 64} and saved["global_step"] == 16
    assert saved["image_size"] == 16
    again = load_stage(str(path), Autoencoder)
    assert again.terms[1].weight == 1e-2
    for name, weight in stage.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_dry_run_does_not_last_until_a_later_term_starts(tmp_path):
    net = KLAutoencoder(latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    losses = [L1(start=32, name="late")]
    assert train(tmp_path, Autoencoder(net, losses=losses), fast_dev_run=2).global_step == 2
    with pytest.raises(ValueError, match="late starts after 32 samples, but the run ends after 8"):
        train(tmp_path, Autoencoder(net, losses=losses), max_steps=2)


def test_later_stages_and_commands_read_it(trained, tmp_path):
    _, path = trained
    latents = AutoencoderLatents(str(path.parents[1]))
    assert latents.decode(torch.zeros(1, *latents.shape(16, 16))).shape == (1, 3, 16, 16)
    write_tar(tmp_path / "train-000000.tar", [file for n in range(4) for file in sample(n)])
    out = tmp_path / "latents"
    arguments = [f"--autoencoder={path.parents[1]}", f"--shards={tmp_path}/train-000000.tar", f"--out={out}"]
    assert encode.main(arguments) == 0
    assert (out / "train-000000.tar").exists()


@pytest.mark.parametrize("saved", ["lightning_logs/version_0/checkpoints/a.ckpt", "model.ckpt"])
def test_it_is_used_whatever_becomes_of_what_it_is_built_on(trained, tmp_path, saved):
    _, path = trained
    stage = Diffusion(AutoencoderLatents(str(path)), Unconditional(), Affine, optimizer=AdamW(1e-3, warmup=1))
    folder = tmp_path / "notebook"
    train(folder, stage).save_checkpoint(folder / saved)
    path.unlink()  # it is replaced, as training further does: a hard link stays what it was
    path.write_bytes(b"another one")
    again = load_stage(str(folder / saved), Diffusion)
    assert torch.equal(again.latents.latent_std, stage.latents.latent_std)


def test_training_goes_on_without_a_copy_of_what_is_gone(trained, tmp_path):
    _, path = trained
    stage = Diffusion(AutoencoderLatents(str(path)), Unconditional(), Affine, optimizer=AdamW(1e-3, warmup=1))
    path.unlink()
    with pytest.warns(UserWarning, match="keeps no copy of what this run is built on: .* does not exist"):
        assert train(tmp_path / "notebook", stage).global_step == 16


@pytest.mark.parametrize(("batches", "steps", "warns"), [(4, 4, False), (3, 6, True)])
def test_batches_that_make_no_whole_step_at_the_end_of_an_epoch_warn(tmp_path, batches, steps, warns):
    stage = Diffusion(Pixels(), Unconditional(), Affine, optimizer=AdamW(1e-3, warmup=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(tmp_path, stage, accumulate_grad_batches=batches)
    messages = [str(each.message) for each in caught]
    assert any(f"{batches} does not divide the 8 batches of an epoch" in text for text in messages) == warns
    assert stage.progress.steps == run.global_step == steps
