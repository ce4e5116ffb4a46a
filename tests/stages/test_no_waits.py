"""A step that is not logged reads no number of the device: on a GPU the host would wait for it."""

import csv

import pytest
import torch
from tiny_stage import loader, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.callbacks.ema import EMA
from ldm.callbacks.progress import ProgressBar
from ldm.callbacks.skip_nonfinite import SkipNonFinite
from ldm.callbacks.throughput import Throughput
from ldm.checkpointing.callback import Checkpoints
from ldm.conditioners.none import Unconditional
from ldm.latents.space import Pixels
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.losses import R1, Adversarial, LeCam
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.discriminator import PatchGAN
from ldm.nets.unet import UNet
from ldm.optim.recipes import AdamW
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion


class Reads(TorchDispatchMode):
    """Notes after how many steps of ``stage`` a number is read: item(), float(), bool() and the like."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.steps = stage, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        steps = self.stage.progress.steps
        if func is torch.ops.aten._local_scalar_dense.default and steps:  # Lightning reads some at the start
            self.steps.append(steps)
        return func(*args, **kwargs or {})


def autoencoder(recipe):
    net = KLAutoencoder(latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    return Autoencoder(net, optimizer=recipe)


def adversarial(recipe):
    net = KLAutoencoder(latent_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
    judge = Adversarial(PatchGAN(4, 1, "spectral"), regularizers=[R1(), LeCam()], start=8)
    return Autoencoder(net, optimizer=recipe, losses=[judge])


def diffusion(recipe):
    def unet(dims):
        return UNet(dims, block_out_channels=[8, 8], attention=[False, False], norm_groups=4)

    return Diffusion(Pixels(), Unconditional(), unet, optimizer=recipe)


def fit(folder, stage, **changes):
    settings = {"max_steps": 10, "log_every_n_steps": 4, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    callbacks = [SkipNonFinite(), Throughput(), ProgressBar(), EMA(), Checkpoints()]
    run = trainer(
        folder, callbacks=callbacks, logger=MetricsCSV(str(folder)), enable_checkpointing=True,
        enable_progress_bar=True, **{**settings, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    with Reads(stage) as reads:
        run.fit(stage, loader(100, size=8))
    return reads.steps


@pytest.mark.parametrize("build", [autoencoder, adversarial, diffusion])
def test_nothing_is_read_between_logged_steps(tmp_path, build):
    read = fit(tmp_path, build(AdamW(warmup=1)))
    # the last step is logged, and there the checkpoint is written
    assert set(read) <= {4, 8, 10} and {4, 8} <= set(read)


def test_accumulated_batches_read_nothing_either(tmp_path):
    read = fit(tmp_path, autoencoder(AdamW(warmup=1)), accumulate_grad_batches=2, max_steps=6)
    assert set(read) <= {4, 6}


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_logged_rows_are_those_of_a_run_that_logs_every_step(tmp_path):
    for every in (1, 4):
        fit(tmp_path / str(every), diffusion(AdamW(warmup=1)), log_every_n_steps=every)
    some, each = rows(tmp_path / "4"), {row["step"]: row for row in rows(tmp_path / "1")}
    assert [row["step"] for row in some] == ["3", "7", "9"]
    for row in some:
        for name in ("samples", "train/loss", "train/lr", "train/skipped_steps"):
            assert row[name] == each[row["step"]][name] != "", name
