"""Metrics of torchmetrics behind the adapter: against ours, over processes, by YAML."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import ArgumentParser
from torch import nn
from torchmetrics import Metric as TheirMetric
from torchmetrics.image import (
    FrechetInceptionDistance,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

from ldm.distributed.group import ProcessGroup, SingleProcess
from ldm.evaluation.session import Measurement
from ldm.metrics.frechet import frechet_distance
from ldm.metrics.metric import Metric, ReferenceInfo
from ldm.metrics.moments import GaussianMoments
from ldm.metrics.psnr import PSNR
from ldm.metrics.ssim import SSIM
from ldm.metrics.torch_metric import TorchMetric

COUNT = 14
SHAPE = (3, 16, 16)


class Corners(nn.Module):
    """Features of an image: four of its pixels, in [0, 255] or [0, 1]."""

    num_features = 4

    def forward(self, images):
        return images[:, 0, :2, :2].flatten(1).double()


class Words(TheirMetric):
    """The mean of draws from the global generator, one per caption: with a state of its own."""

    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("draws", default=torch.zeros(2), dist_reduce_fx="sum")

    def update(self, images, text):
        assert images.dtype == torch.uint8
        self.draws += torch.stack([torch.rand(len(text)).sum(), torch.tensor(float(len(text)))])

    def compute(self):
        return self.draws[0] / self.draws[1]


class Fails(TheirMetric):
    full_state_update = False

    def update(self, images):
        pass

    def compute(self):
        raise ValueError("too few images")


def metrics():
    return [
        TorchMetric(PeakSignalNoiseRatio(2.0, dim=(1, 2, 3), reduction="elementwise_mean"), "their_psnr"),
        TorchMetric(StructuralSimilarityIndexMeasure(data_range=1.0), "their_ssim", range="[0,1]"),
        TorchMetric(FrechetInceptionDistance(Corners(), input_img_size=SHAPE), "their_fid", range="uint8"),
        TorchMetric(Words(), "words", "images+text", "uint8"),
        TorchMetric(Fails(), "fails", "images"),
        PSNR(),
        SSIM(),
    ]


def images():
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (2, COUNT, 3, 16, 16), generator=generator) / 127.5 - 1.0).unbind()


def measure(indices, group):
    """Values and failures of the samples ``indices``, in batches of 3."""
    real, made = images()
    run = Measurement(metrics(), group, torch.device("cpu"))
    run.begin(ReferenceInfo())
    for start in range(0, len(indices), 3):
        part = indices[start : start + 3]
        batch = {"image": real[part], "key": [f"{i}" for i in part], "text": ["x"] * len(part)}
        run.update(made[part], batch | {"index": torch.tensor(part)})
    return {value.name: value.value for value in run.finish()}, run.failures


def work(rank, world, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = measure(list(range(rank, COUNT, world)), ProcessGroup("cpu"))
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_values_equal_those_of_torchmetrics_and_a_failing_metric_is_left_out():
    values, failures = measure(list(range(COUNT)), SingleProcess())
    assert values["their_psnr"] == pytest.approx(values["psnr"], rel=1e-5)
    assert values["their_ssim"] == pytest.approx(values["ssim"], abs=1e-6)
    gaussians = []
    for each in images():
        moments = GaussianMoments()
        moments.update(Corners()(((each + 1) * 127.5).round()))
        gaussians.append(moments.gaussian)
    assert values["their_fid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    assert failures == ["metric TorchMetric is left out of this evaluation: ValueError: too few images"]


def test_random_numbers_are_seeded_and_those_of_training_are_left_alone():
    before = torch.random.get_rng_state()
    first = measure(list(range(COUNT)), SingleProcess())[0]["words"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert measure(list(range(COUNT)), SingleProcess())[0]["words"] == first


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    alone, _ = measure(list(range(COUNT)), SingleProcess())
    mp.start_processes(work, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        values, failures = torch.load(tmp_path / f"{rank}.pt")
        assert len(failures) == 1 and "too few images" in failures[0]
        assert values.keys() == alone.keys()
        for name in alone.keys() - {"words"}:
            assert values[name] == pytest.approx(alone[name], rel=1e-5)


def test_one_is_built_by_name_with_its_direction():
    parser = ArgumentParser()
    parser.add_argument("--metric", type=Metric, sub_configs=True)
    inner = {"class_path": "torchmetrics.image.PeakSignalNoiseRatio", "init_args": {"data_range": 2.0}}
    arguments = {"metric": inner, "name": "psnr_of_all", "range": "[0,1]"}
    config = parser.parse_object(
        {"metric": {"class_path": "ldm.metrics.torch_metric.TorchMetric", "init_args": arguments}}
    )
    metric = parser.instantiate(config).metric
    assert metric.higher_is_better == {"psnr_of_all": True}
    assert metric.compute() == {}
    assert metric.metadata("psnr_of_all")["metric"] == "torchmetrics.image.psnr.PeakSignalNoiseRatio"
    assert TorchMetric(Words(), "words").higher_is_better == {"words": False}


def test_a_value_that_is_no_number_is_refused():
    metric = TorchMetric(PeakSignalNoiseRatio(2.0, dim=1, reduction="none"), "psnr")
    real, made = images()
    metric.update(made, {"image": real})
    metric.sync(SingleProcess())
    with pytest.raises(ValueError, match="psnr: PeakSignalNoiseRatio gave no single number"):
        metric.compute()
