"""Fit the tiny stage on N processes and print the results of its callbacks: run by test_evaluation.py."""

import json
import sys
from pathlib import Path

import lightning as L
from tiny_stage import TinyStage, loader, trainer
from torchmetrics.image import PeakSignalNoiseRatio

from ldm.callbacks.ema import EMA
from ldm.callbacks.evaluation import Evaluation
from ldm.callbacks.sample_grid import SampleGrid
from ldm.metrics.extractors.clip import Embedding
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.kernel import KID
from ldm.metrics.psnr import PSNR
from ldm.metrics.torch_metric import TorchMetric


class Pixels:
    def image_features(self, image):
        return image.flatten(1)[:, :8]


class Data(L.LightningDataModule):
    """Rank r of w reads every w-th position; 41 validation samples are odd on purpose."""

    def train_dataloader(self):
        world = self.trainer.world_size
        return loader(640, 8 // world, self.trainer.global_rank, world)

    def val_dataloader(self):
        return loader(41, 4, self.trainer.global_rank, self.trainer.world_size, seed=1)


class WithoutNoise(TinyStage):
    def training_step(self, batch, batch_idx):
        return (self(batch["image"]) - batch["image"]).square().mean()


def main(folder, num_processes):
    metrics = [FeatureMetrics(Embedding(Pixels(), "pixels"), [Frechet(), KID(5, 20)]), PSNR()]
    metrics.append(TorchMetric(PeakSignalNoiseRatio(2.0), "psnr_of_all"))
    callbacks = [SampleGrid(5), Evaluation(metrics, num_samples=37), EMA(0.9)]
    strategy = "ddp" if num_processes > 1 else "auto"
    run = trainer(folder, devices=num_processes, strategy=strategy, callbacks=callbacks)
    run.fit(WithoutNoise(), datamodule=Data())
    values = {k: float(v) for k, v in run.callback_metrics.items()}
    Path(folder, f"rank{run.global_rank}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
