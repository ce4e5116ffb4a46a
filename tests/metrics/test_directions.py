"""Each metric and stage states which direction of its values is better."""

import pytest
import torch
from torch import nn

from data.shapes.metrics import KnownPSNR, LayoutAccuracy, MapAgreement
from data.shapes.reader import CaptionAccuracy
from ldm.callbacks.evaluation import Evaluation
from ldm.loggers.directions import HasDirections
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.features import Extractor
from ldm.metrics.frechet import Frechet
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import Retrieval
from ldm.metrics.ssim import SSIM
from ldm.metrics.zero_shot import ZeroShot


class Blind(Extractor):
    def forward(self, images, batch, views):
        raise NotImplementedError

    def metadata(self):
        return {}


class NoTower(nn.Module):
    def image_features(self, image):
        raise NotImplementedError

    def encode_text(self, text):
        raise NotImplementedError


VIEWS = ("features", "spatial", "logits", "embedding", "text", "agreement", "caption")
MEASURES = [Frechet(), Frechet("spatial", "sfid"), KID(), CMMD(), InceptionScore(), Neighbours(), CLIPScore()]


@pytest.mark.parametrize(
    ("metric", "lower", "higher"),
    [
        (
            FeatureMetrics(Blind("x", VIEWS), [*MEASURES, Retrieval((1, 5))]),
            {"fid/x", "sfid/x", "kid/x", "cmmd/x"},
            {"is/x", "precision/x", "recall/x", "density/x", "coverage/x", "clip_score/x"}
            | {"image_to_text@1/x", "image_to_text@5/x", "text_to_image@1/x", "text_to_image@5/x"},
        ),
        (PSNR(), set(), {"psnr"}),
        (SSIM("structure"), set(), {"structure"}),
        (ZeroShot(NoTower(), ["a", "b"], ks=(1, 2, 5)), set(), {"zero_shot@1", "zero_shot@2"}),
        (KnownPSNR(), set(), {"known/psnr"}),
        (MapAgreement(), set(), {"map/all", "map/objects"}),
        (LayoutAccuracy(), set(), {f"layout/{field}" for field in ("count", "class", "position", "all")}),
        (
            CaptionAccuracy(),
            set(),
            {
                f"caption/{field}"
                for field in ("count", "colour", "shape", "size", "position", "background", "all")
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_metric_states_directions_of_measures_not_of_floors_and_deviations(metric, lower, higher):
    assert metric.higher_is_better == dict.fromkeys(lower, False) | dict.fromkeys(higher, True)


def test_an_evaluation_states_them_under_the_names_that_it_logs():
    callback = Evaluation([PSNR()], 4, name="often")
    assert isinstance(callback, HasDirections)
    assert callback.higher_is_better == {"psnr@often": True}


def test_means_are_those_of_the_images():
    metric = MapAgreement()
    metric.add("map/all", torch.tensor([0.25, 0.5]))
    assert metric.compute() == {"map/all": 0.375} and metric.metadata("map/all")["num"] == 2
