"""Resuming with another optimizer names the one in the checkpoint."""

import lightning as L
import pytest
import torch
from tiny_stage import loader

from ldm.nets.autoencoder import KLAutoencoder
from ldm.optim.recipes import AdamW, Muon
from ldm.stages.autoencoder import Autoencoder


def fit(folder, optimizer, steps, widths=(8, 8)):
    torch.manual_seed(0)
    net = KLAutoencoder(latent_channels=3, block_out_channels=widths, layers_per_block=1, norm_groups=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=steps, limit_val_batches=0,
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    last = folder / "last.ckpt"
    start = last if last.exists() else None
    run.fit(Autoencoder(net, optimizer=optimizer), loader(8, 4, size=8), ckpt_path=start)
    run.save_checkpoint(last)


@pytest.mark.parametrize(("then", "now"), [(AdamW, Muon), (Muon, AdamW)])
def test_another_optimizer_is_named(tmp_path, then, now):
    fit(tmp_path, then(warmup=1), 1)
    message = rf"got {now.__name__} \(.*checkpoint holds the state of {then.__name__} \("
    with pytest.raises(ValueError, match=message) as error:
        fit(tmp_path, now(warmup=1), 2)
    assert "--weights" in str(error.value) and len(str(error.value)) <= 300


def test_the_same_optimizer_with_other_settings_goes_on(tmp_path):
    fit(tmp_path, AdamW(warmup=1), 1)
    fit(tmp_path, AdamW(lr=0.5, warmup=3), 2)


def test_another_network_is_not_taken_for_another_optimizer(tmp_path):
    fit(tmp_path, AdamW(warmup=1), 1)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        fit(tmp_path, AdamW(warmup=1), 2, widths=(8, 8, 8))
