"""Files of ldm.evaluate are readable by other programs and by itself."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ldm.distributed.group import SingleProcess
from ldm.evaluation.report import Result, plot, slug, table, write_json, write_npz
from ldm.evaluation.session import Measurement, Value
from ldm.metrics.extractors.clip import Embedding
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.metric import ReferenceInfo


class Means(nn.Module):
    def image_features(self, image):
        return image.double().mean((2, 3))


def measurement(reference=None):
    metric = FeatureMetrics(Embedding(Means(), "inception"), [Frechet()], reference)
    run = Measurement([metric], SingleProcess(), torch.device("cpu"))
    run.begin(ReferenceInfo())
    return run


def test_an_npz_has_what_adm_reads_and_serves_as_a_reference(tmp_path):
    pixels = torch.randint(
        0, 256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    batch = {"key": [""] * 20, "index": torch.arange(20), "image": pixels / 127.5 - 1}
    run = measurement()
    run.update_real(batch)
    run.update(batch["image"], batch)
    run.compute()
    write_npz(tmp_path / "images.npz", pixels.permute(0, 2, 3, 1), run, 4)
    with np.load(tmp_path / "images.npz") as file:
        features = (pixels / 127.5 - 1).double().mean((2, 3)).numpy()
        np.testing.assert_allclose(file["mu"], features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(features.T), rtol=1e-10)
        assert np.array_equal(file["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    again = measurement(str(tmp_path / "images.npz"))
    again.update(batch["image"] + 0.5, batch)
    (value,) = again.finish()
    assert value.value == pytest.approx(3 * 0.25, rel=1e-6) and value.metadata["num_real"] == 20


def result(name, score, distance):
    return Result(name, "a", {}, [Value("clip_score/c", score, {}), Value("fid/c", distance, {})])


def test_a_table_has_a_row_for_each_candidate():
    rows = table([result("one", 1.5, 2.0), Result("two", "a", {}, [Value("fid/c", 3.0, {})])]).splitlines()
    assert rows == [
        "|  | clip_score/c | fid/c |",
        "| --- | --- | --- |",
        "| one | 1.5 | 2 |",
        "| two |  | 3 |",
    ]


def test_the_numbers_say_whether_all_are_there(tmp_path):
    for is_complete in (False, True):
        write_json(tmp_path / "evaluation.json", [result("one", 1.5, 2.0)], is_complete)
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert (found["is_complete"], len(found["results"])) == (is_complete, 1)


def test_a_curve_needs_two_points(tmp_path):
    assert not plot(tmp_path / "curve.png", [result("one", 1.0, 2.0)])
    assert plot(tmp_path / "curve.png", [result("one", 0.0, 2.0), result("two", 2.0, 1.0)])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_slug_is_a_file_name():
    assert slug("runs/demo/diffusion steps=2 guidance=1.5") == "runs-demo-diffusion-steps=2-guidance=1.5"
    assert slug("../..") == "images"
