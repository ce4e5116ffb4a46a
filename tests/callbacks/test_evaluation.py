"""One generation pass for all metrics, which training does not notice."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
import two_processes
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_stage import TinyStage, loader, trainer
from torch import nn

from ldm.callbacks.csv_logger import MetricsCSV
from ldm.callbacks.ema import EMA
from ldm.callbacks.evaluation import Evaluation
from ldm.metrics.metric import Mean, Metric
from ldm.metrics.psnr import PSNR
from ldm.pictures import from_bytes, to_bytes


class Spy(Metric):
    """Keeps what it is fed; measures the mean of the pictures."""

    def __init__(self, name="spy"):
        self.name = name
        self.net = nn.Linear(1, 1)
        self.fed = []
        self.devices = []
        self.reset()

    def reset(self):
        self._mean = Mean()

    def update(self, images, batch):
        self.fed.append((images, batch["key"]))
        torch.rand(3)
        self._mean.update(images.mean((1, 2, 3)))

    def sync(self, all_reduce):
        self._mean.sync(all_reduce)

    def compute(self):
        return self._mean.compute(self.name)

    def to(self, device):
        super().to(device)
        self.devices.append(str(device))


class Broken(Spy):
    """Fails where it is told to."""

    def __init__(self, where):
        super().__init__("broken")
        self.where = where

    def update(self, images, batch):
        if self.where == "update":
            raise RuntimeError("no weights")

    def compute(self):
        raise RuntimeError("no weights")


class Draws(TinyStage):
    num_generated = 0

    def generate(self, batch, seed):
        self.num_generated += len(batch["key"])
        return super().generate(batch, seed) + 0.1 * torch.randn_like(batch["image"])


def fit(folder, *callbacks, stage=None, **changes):
    torch.manual_seed(0)
    stage = stage or Draws()
    run = trainer(folder, callbacks=list(callbacks), **changes)
    run.fit(stage, loader(1000), loader(12))
    return run, stage


def test_pictures_are_generated_once_and_rounded_for_all_metrics(tmp_path):
    spies = [Spy("a"), Spy("b")]
    run, stage = fit(tmp_path, Evaluation(spies, num_samples=10), max_steps=4)
    assert stage.num_generated == 10
    assert [key for _, keys in spies[0].fed for key in keys] == [f"{i:04d}" for i in range(10)]
    for (images, _), (other, _) in zip(spies[0].fed, spies[1].fed, strict=True):
        assert images is other
        assert torch.equal(from_bytes(to_bytes(images)), images)
    mean = torch.cat([images for images, _ in spies[0].fed]).mean().item()
    assert run.callback_metrics["val/a"].item() == pytest.approx(mean, rel=1e-5)
    assert spies[0].devices == ["cpu", "cpu"]


def test_values_are_logged_in_the_validations_row_and_can_be_monitored(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/picture_psnr", mode="max")
    log = MetricsCSV(str(tmp_path))
    fit(tmp_path, Evaluation([PSNR()], 8), best, logger=log, enable_checkpointing=True)
    with open(tmp_path / "metrics.csv", newline="") as file:
        validations = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert [row["samples"] for row in validations] == ["16", "32"]
    assert all(float(row["val/picture_psnr"]) > 0 for row in validations)
    assert best.best_model_score.item() == pytest.approx(
        max(float(row["val/picture_psnr"]) for row in validations)
    )


def test_training_is_the_same_with_and_without(tmp_path):
    _, alone = fit(tmp_path)
    _, measured = fit(tmp_path, Evaluation([Spy(), PSNR()], 10))
    assert measured.training and alone.training
    for name, weight in alone.state_dict().items():
        assert torch.equal(measured.state_dict()[name], weight), name


def test_metrics_see_the_averaged_weights(tmp_path):
    spy, ema = Spy(), EMA(0.9)
    _, stage = fit(tmp_path, Evaluation([spy], 4), ema, stage=TinyStage(), max_steps=4)
    batch = next(iter(loader(12)))
    with ema.swapped(stage):
        expected = from_bytes(to_bytes(stage.generate(batch, 0)))
    assert torch.equal(spy.fed[0][0], expected)


@pytest.mark.parametrize("where", ["update", "compute"])
def test_a_failing_metric_is_named_and_the_others_go_on(tmp_path, where):
    with pytest.warns(
        UserWarning, match="metric Broken is left out of this evaluation: RuntimeError: no weights"
    ):
        run, _ = fit(tmp_path, Evaluation([Broken(where), PSNR()], 8))
    assert "val/picture_psnr" in run.callback_metrics and "val/broken" not in run.callback_metrics
    assert run.global_step == 8


def test_metrics_are_not_in_the_checkpoint(tmp_path):
    run, _ = fit(tmp_path, Evaluation([Spy()], 8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(TinyStage().state_dict())


def test_it_is_due_every_so_many_samples_at_the_end_and_after_a_resume(tmp_path):
    def evaluated_at(evaluation, **changes):
        at = []
        spy = evaluation.metrics[0]
        spy.compute = lambda: at.append(stage.samples_seen) or {}
        stage = TinyStage()
        fit(tmp_path, evaluation, stage=stage, val_check_interval=1, **changes)
        return at

    # four samples a step: validations at 4, 8, ...
    at = evaluated_at(Evaluation([Spy()], 4, every_n_samples=12), max_steps=10)
    assert at == [4, 12, 24, 36, 40]
    again = Evaluation([Spy()], 4, every_n_samples=12)
    again.load_state_dict({"next": 36})
    assert evaluated_at(again, max_steps=10) == [36, 40]
    assert evaluated_at(Evaluation([Spy()], 4), max_steps=3) == [4, 8, 12]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    here = Path(__file__).parent
    for count in "12":
        (tmp_path / count).mkdir()
    two_processes.main(str(tmp_path / "1"), 1)
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{Path.cwd()}"}
    script = [sys.executable, str(here / "two_processes.py"), str(tmp_path / "2"), "2"]
    subprocess.run(script, check=True, env=environment, capture_output=True)
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    alone, first, second = read("1/rank0.json"), read("2/rank0.json"), read("2/rank1.json")
    assert {"val/fid/pixels", "val/fid/pixels_floor", "val/picture_psnr", "val/loss"} <= alone.keys()
    assert first == pytest.approx(alone, rel=1e-5) and second == pytest.approx(alone, rel=1e-5)
    sheets = [(tmp_path / name / "pictures" / "tiny-0000000064.png").read_bytes() for name in "12"]
    assert sheets[0] == sheets[1]


def test_a_config_names_metrics_and_the_towers_they_measure_with(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--evaluation", type=Evaluation)
    nowhere = str(tmp_path / "nowhere")
    clip = {"class_path": "ldm.stages.load.CLIPTower", "init_args": {"checkpoint": nowhere}}
    metrics = [
        {"class_path": "ldm.metrics.frechet.FrechetDistance", "init_args": {"features": clip}},
        {"class_path": "ldm.metrics.clip_score.CLIPScore", "init_args": {"clip": clip}},
        {"class_path": "ldm.metrics.psnr.PSNR"},
    ]
    config = {"class_path": "Evaluation", "init_args": {"metrics": metrics, "num_samples": 8}}
    parsed = parser.parse_object({"evaluation": config})
    assert parsed.evaluation.init_args.metrics[1].init_args.clip.init_args.checkpoint == nowhere
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        parser.instantiate_classes(parsed)
