"""One generation pass for all metrics, which training does not notice."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
import two_processes
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_stage import TinyStage, loader, trainer
from torch import nn

from ldm.callbacks.ema import EMA
from ldm.callbacks.evaluation import Evaluation
from ldm.io.images import from_bytes, to_bytes
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.metrics.extractors.clip import Embedding
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.metric import Mean, Metric
from ldm.metrics.psnr import PSNR


class Spy(Metric):
    """Keeps what it is fed; measures the mean of the images."""

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

    def sync(self, group):
        self._mean.sync(group)

    def compute(self):
        return self._mean.compute(self.name)

    def to(self, device):
        super().to(device)
        self.devices.append(str(device))


class Broken(Spy):
    """Fails in the configured hook."""

    def __init__(self, where):
        super().__init__("broken")
        self.where = where

    def begin(self, reals, group):
        self._fail("begin")

    def update_real(self, batch):
        self._fail("see")

    def update(self, images, batch):
        self._fail("update")

    def sync(self, group):
        self._fail("sync")

    def compute(self):
        self._fail("compute")
        return {"broken": 1.0}

    def metadata(self, name):
        self._fail("says")

    def _fail(self, where):
        if self.where == where:
            raise RuntimeError("no weights")


class Draws(TinyStage):
    num_generated = 0

    def generate(self, batch, seed):
        self.num_generated += len(batch["key"])
        return super().generate(batch, seed) + 0.1 * torch.randn_like(batch["image"])


def fit(folder, *callbacks, stage=None, datamodule=None, **changes):
    torch.manual_seed(0)
    stage = stage or Draws()
    run = trainer(folder, callbacks=list(callbacks), **changes)
    if datamodule:
        run.fit(stage, datamodule=datamodule)
    else:
        run.fit(stage, loader(1000), loader(12))
    return run, stage


def test_images_are_generated_once_and_rounded_for_all_metrics(tmp_path):
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
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/psnr", mode="max")
    log = MetricsCSV(str(tmp_path))
    fit(tmp_path, Evaluation([PSNR()], 8), best, logger=log, enable_checkpointing=True)
    with open(tmp_path / "metrics.csv", newline="") as file:
        validations = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert [row["samples"] for row in validations] == ["16", "32"]
    assert all(float(row["val/psnr"]) > 0 for row in validations)
    assert best.best_model_score.item() == pytest.approx(max(float(row["val/psnr"]) for row in validations))


def test_training_is_the_same_with_and_without(tmp_path):
    _, alone = fit(tmp_path)
    _, measured = fit(tmp_path, Evaluation([Spy(), PSNR()], 10))
    assert measured.training and alone.training
    for name, weight in alone.state_dict().items():
        assert torch.equal(measured.state_dict()[name], weight), name


def test_metrics_use_the_averaged_weights(tmp_path):
    spy, ema = Spy(), EMA(0.9)
    _, stage = fit(tmp_path, Evaluation([spy], 4), ema, stage=TinyStage(), max_steps=4)
    batch = next(iter(loader(12)))
    with ema.swapped(stage):
        expected = from_bytes(to_bytes(stage.generate(batch, 0)))
    assert torch.equal(spy.fed[0][0], expected)


@pytest.mark.parametrize("where", ["begin", "see", "update", "sync", "compute", "says"])
def test_a_failing_metric_is_named_and_the_others_go_on(tmp_path, where):
    with pytest.warns(
        UserWarning, match="metric Broken is left out of this evaluation: RuntimeError: no weights"
    ):
        run, _ = fit(tmp_path, Evaluation([Broken(where), PSNR()], 8))
    assert "val/psnr" in run.callback_metrics and "val/broken" not in run.callback_metrics
    assert run.global_step == 8


def test_images_that_cannot_be_drawn_cost_one_evaluation(tmp_path):
    class Fails(Draws):
        def generate(self, batch, seed):
            images = super().generate(batch, seed)
            if self.progress.samples == 16 and self.num_generated > 4:
                raise RuntimeError("out of memory")
            return images

    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match="PSNR is left out of this evaluation: an image could not be drawn: R"
    ):
        run, stage = fit(tmp_path, Evaluation([Spy(), PSNR()], 12), stage=Fails())
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line.get("name", "failed") for line in lines] == ["failed"] * 2 + ["val/spy", "val/psnr"]
    assert lines[-1]["num"] == 12 and stage.num_generated == 8 + 12  # none was drawn after the failure
    assert run.global_step == 8


def test_a_failing_measure_is_named_and_the_others_of_its_network_go_on(tmp_path):
    class Fails(Frechet):
        def compute(self, generated, real):
            raise RuntimeError("no root")

    class Flat(nn.Module):
        def image_features(self, image):
            return image.mean((2, 3))

    metric = FeatureMetrics(Embedding(Flat(), "flat"), [Fails(), Frechet()])
    message = "measure Fails of flat is left out of this evaluation: RuntimeError: no root"
    with pytest.warns(UserWarning, match=message):
        run, _ = fit(tmp_path, Evaluation([metric], 8))
    assert "val/fid/flat" in run.callback_metrics and run.global_step == 8
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines if "failed" in line] == [message] * 2


def test_statistics_of_images_of_another_side_are_one_line_before_any_is_measured(tmp_path):
    class Untouched(nn.Module):
        def image_features(self, image):
            raise AssertionError("it was known before")

    record = np.array(json.dumps({"size": 256, "num": 9}))
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3), record=record)
    metric = FeatureMetrics(Embedding(Untouched(), "flat"), [Frechet()], str(tmp_path / "real.npz"))
    stage = TinyStage()
    stage.image_size = 4
    with pytest.warns(UserWarning, match=r"real.npz' is of images of side 256, got images of side 4"):
        run, _ = fit(tmp_path, Evaluation([metric, PSNR()], 8), stage=stage, max_steps=4)
    assert "val/psnr" in run.callback_metrics


def test_records_that_cannot_be_written_are_a_warning(tmp_path):
    (tmp_path / "evaluations.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"records of this evaluation are not in .*evaluations.jsonl"):
        run, _ = fit(tmp_path, Evaluation([PSNR()], 8))
    assert "val/psnr" in run.callback_metrics and run.global_step == 8


def test_metrics_are_not_in_the_checkpoint(tmp_path):
    run, _ = fit(tmp_path, Evaluation([Spy()], 8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(TinyStage().state_dict())


def test_it_is_due_every_so_many_steps_at_the_end_and_after_a_resume(tmp_path):
    def evaluated_at(evaluation, **changes):
        at = []
        spy = evaluation.metrics[0]
        spy.compute = lambda: at.append(stage.progress.samples) or {}
        stage = TinyStage()
        fit(tmp_path, evaluation, stage=stage, val_check_interval=1, **changes)
        return at

    # four samples a step: validations at 4, 8, ...
    at = evaluated_at(Evaluation([Spy()], 4, every_n_steps=3), max_steps=10)
    assert at == [4, 12, 24, 36, 40]
    again = Evaluation([Spy()], 4, every_n_steps=3)
    again.load_state_dict({"next_step": 9})
    assert evaluated_at(again, max_steps=10) == [36, 40]
    assert evaluated_at(Evaluation([Spy()], 4), max_steps=3) == [4, 8, 12]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    here = Path(two_processes.__file__).parent
    for count in "12":
        (tmp_path / count).mkdir()
    two_processes.main(str(tmp_path / "1"), 1)
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{Path.cwd()}"}
    script = [sys.executable, str(here / "two_processes.py"), str(tmp_path / "2"), "2"]
    subprocess.run(script, check=True, env=environment, capture_output=True)
    read = lambda name: json.loads((tmp_path / name).read_text())  # noqa: E731
    alone, first, second = read("1/rank0.json"), read("2/rank0.json"), read("2/rank1.json")
    assert {
        "val/fid/pixels",
        "val/fid_floor/pixels",
        "val/kid/pixels",
        "val/psnr",
        "val/psnr_of_all",
    } <= alone.keys()
    assert first == pytest.approx(alone, rel=1e-5) and second == pytest.approx(alone, rel=1e-5)
    grids = [(tmp_path / name / "images" / "tiny-0000000064.png").read_bytes() for name in "12"]
    assert grids[0] == grids[1]


def test_a_config_names_metrics_and_the_towers_they_measure_with(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--evaluation", type=Evaluation)
    nowhere = str(tmp_path / "nowhere")
    clip = {"class_path": "ldm.stages.load.CLIPTower", "init_args": {"checkpoint": nowhere}}
    metrics = [
        {"class_path": "ldm.metrics.psnr.PSNR"},
        {
            "class_path": "ldm.metrics.feature_metrics.FeatureMetrics",
            "init_args": {
                "extractor": {
                    "class_path": "ldm.metrics.extractors.clip.CLIPExtractor",
                    "init_args": {"clip": clip},
                },
                "measures": [{"class_path": "ldm.metrics.frechet.Frechet"}],
            },
        },
    ]
    config = {"class_path": "Evaluation", "init_args": {"metrics": metrics, "num_samples": 8}}
    parsed = parser.parse_object({"evaluation": config})
    assert (
        parsed.evaluation.init_args.metrics[1].init_args.extractor.init_args.clip.init_args.checkpoint
        == nowhere
    )
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        parser.instantiate_classes(parsed)


class Doubled:
    """A sampler that a stage could have."""

    def __init__(self, num_steps=7, secret=None):
        self.num_steps = num_steps
        self._secret = secret


class WithSampler(TinyStage):
    def __init__(self):
        super().__init__()
        self.sampler = Doubled(1)
        self.used = []

    def generate(self, batch, seed):
        self.used.append(self.sampler.num_steps)
        return super().generate(batch, seed)


def test_every_number_is_written_with_its_record(tmp_path):
    stage, metrics = WithSampler(), [PSNR(), Spy()]
    fit(tmp_path, Evaluation(metrics, 6, seed=3, sampler=Doubled(7)), EMA(0.9), stage=stage)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["name"], line["samples"]) for line in lines] == [
        ("val/psnr", 16),
        ("val/spy", 16),
        ("val/psnr", 32),
        ("val/spy", 32),
    ]
    assert lines[0]["value"] > 0
    assert {k: v for k, v in lines[0].items() if k != "value"} == {
        "name": "val/psnr",
        "metric": "ldm.metrics.psnr.PSNR",
        "num": 6,
        "stage": "tiny",
        "samples": 16,
        "weights": "ema",
        "evaluation": "Evaluation",
        "precision": "32-true",
        "seed": 3,
        "sampler": "Doubled(num_steps=7)",
        "steps": 7,
    }


def test_it_draws_with_its_own_sampler_and_restores_that_of_the_stage(tmp_path):
    stage = WithSampler()
    mine = stage.sampler
    fit(tmp_path, Evaluation([Spy()], 6, sampler=Doubled(7)), stage=stage)
    assert set(stage.used) == {7} and stage.sampler is mine
    with pytest.raises(ValueError, match="Evaluation: got a sampler, but TinyStage draws with none"):
        fit(tmp_path, Evaluation([Spy()], 6, sampler=Doubled()), stage=TinyStage())


def test_a_resumed_run_replaces_what_it_measures_again(tmp_path):
    fit(tmp_path, Evaluation([PSNR()], 4))
    before = (tmp_path / "evaluations.jsonl").read_text()
    fit(tmp_path, Evaluation([PSNR()], 4))
    assert (tmp_path / "evaluations.jsonl").read_text() == before


def test_a_failure_is_in_the_record_too(tmp_path):
    with pytest.warns(UserWarning, match="metric Broken is left out"):
        fit(tmp_path, Evaluation([Broken("update"), PSNR()], 8), max_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines[1]["failed"].endswith("RuntimeError: no weights") and lines[0]["num"] == 8


class SeesDtype(Spy):
    def update(self, images, batch):
        self.devices.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        super().update(images, batch)


def test_images_are_drawn_in_the_trainers_precision_and_measured_in_float32(tmp_path):
    class Dtypes(TinyStage):
        def generate(self, batch, seed):
            self.dtype_drawn = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return super().generate(batch, seed)

    spy, stage = SeesDtype(), Dtypes()
    fit(tmp_path, Evaluation([spy], 4), stage=stage, precision="bf16-mixed", max_steps=4)
    assert stage.dtype_drawn == torch.bfloat16
    assert torch.float32 in spy.devices and torch.bfloat16 not in spy.devices


class Rolls(Spy):
    """Uses every source of random numbers."""

    def update(self, images, batch):
        random.random()
        np.random.rand(3)
        super().update(images, batch)


def test_no_source_of_random_numbers_moves(tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(0)
    np.random.seed(0)
    fit(tmp_path)
    alone = states()
    random.seed(0)
    np.random.seed(0)
    fit(tmp_path, Evaluation([Rolls()], 10))
    assert states() == alone


class Twelve:
    filter = "score > 3"

    def identity(self, num):
        return f"twelve points {num}"

    fingerprint = identity


class Named(L.LightningDataModule):
    evaluation = Twelve()

    def train_dataloader(self):
        return loader(1000)

    def val_dataloader(self):
        return loader(12)


def test_real_images_are_looked_at_once_in_a_run_and_never_in_the_next(tmp_path):
    def looked(folder, cache):
        class Counts(nn.Module):
            num_seen = 0

            def image_features(self, image):
                Counts.num_seen += len(image)
                return image.flatten(1)[:, :4]

        metrics = [FeatureMetrics(Embedding(Counts(), "c"), [Frechet()])]
        evaluation = Evaluation(metrics, 10, cache=str(cache))
        run, _ = fit(folder, evaluation, datamodule=Named(), limit_val_batches=1.0)
        lines = (folder / "evaluations.jsonl").read_text().splitlines()
        assert [json.loads(line)["filter"] for line in lines] == ["score > 3"] * len(lines) != []
        return Counts.num_seen, run.callback_metrics["val/fid/c"].item()

    first = looked(tmp_path / "a", tmp_path / "statistics")
    second = looked(tmp_path / "b", tmp_path / "statistics")
    assert first == (2 * 10 + 10, second[1])
    assert second[0] == 2 * 10


def test_two_evaluations_of_a_run_keep_out_of_each_others_way(tmp_path):
    often = Evaluation([Spy()], num_samples=2, name="often")
    run = trainer(tmp_path, callbacks=[often, Evaluation([Spy()], num_samples=4, every_n_steps=8)])
    run.fit(TinyStage(), loader(1000), loader(12))
    assert {"val/spy", "val/spy@often"} <= run.callback_metrics.keys()
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert sorted((line["samples"], line["name"], line["evaluation"]) for line in lines) == [
        (16, "val/spy", "Evaluation"),
        (16, "val/spy@often", "Evaluation@often"),
        (32, "val/spy", "Evaluation"),
        (32, "val/spy@often", "Evaluation@often"),
    ]
