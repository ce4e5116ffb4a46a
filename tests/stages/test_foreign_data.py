"""Stages and callbacks train on whatever yields batches, not on our data module alone."""

from __future__ import annotations

import csv

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.callbacks.denoising_grid import DenoisingGrid
from ldm.callbacks.ema import EMA
from ldm.callbacks.evaluation import Evaluation
from ldm.callbacks.progress import ProgressBar
from ldm.callbacks.sample_grid import SampleGrid
from ldm.callbacks.throughput import Throughput
from ldm.checkpointing.callback import Checkpoints
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.conditioners.label import ClassLabel
from ldm.data.fields import collate
from ldm.diffusion.samplers.ddim import DDIM
from ldm.latents.space import Pixels
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.metrics.psnr import PSNR
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion


class Squares(Dataset):
    """Images and labels made by a program."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"key": f"square {i}", "image": torch.full((3, 8, 8), i / 8 - 1), "label": i % 2}


class Plain(L.LightningDataModule):
    """Nothing but two loaders."""

    def train_dataloader(self):
        return DataLoader(Squares(), batch_size=4, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(Squares(), batch_size=4, collate_fn=collate)


def autoencoder():
    return Autoencoder(
        KLAutoencoder(latent_channels=2, block_out_channels=[8, 8], layers_per_block=1, norm_groups=4)
    )


def diffusion():
    def unet(dims):
        return UNet(
            dims, block_out_channels=[8, 8], layers_per_block=1, attention=[False, True], norm_groups=4
        )

    return Diffusion(Pixels(), ClassLabel(2, 8), unet, sampler=DDIM(2))


def trainer(folder):
    drawing = [SampleGrid(num=4), DenoisingGrid(), Evaluation([PSNR()], num_samples=8)]
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=4,
        max_epochs=-1,
        val_check_interval=2,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=MetricsCSV(str(folder)),
        callbacks=[*drawing, EMA(), Checkpoints(), Throughput(), ProgressBar()],
        plugins=[AtomicCheckpointIO()],
    )


@pytest.mark.parametrize("make", [autoencoder, diffusion])
@pytest.mark.parametrize("plain", [True, False], ids=["module", "loaders"])
def test_a_stage_trains_with_its_callbacks(tmp_path, make, plain):
    L.seed_everything(0, verbose=False)
    stage, run, data = make(), trainer(tmp_path), Plain()
    if plain:
        run.fit(stage, datamodule=data)
    else:
        run.fit(stage, data.train_dataloader(), data.val_dataloader())
    assert stage.progress.samples == 16
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert any(row.get("val/loss") for row in rows)
    assert list((tmp_path / "images").glob("*.png"))
    (checkpoint,) = (tmp_path / "checkpoints").glob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["progress"]["samples"] == 16
