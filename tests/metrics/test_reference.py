"""Statistics of real images: computed once, kept under what they depend on, read from ADM's files."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from ldm.distributed.group import SingleProcess
from ldm.evaluation.session import Measurement
from ldm.metrics.extractors.clip import Embedding
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.features import Extractor
from ldm.metrics.frechet import Frechet
from ldm.metrics.kernel import KID
from ldm.metrics.metric import ReferenceInfo
from ldm.metrics.psnr import PSNR


class Means(nn.Module):
    """Counts the images that it looks at."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.num_seen = 0

    def image_features(self, image):
        self.num_seen += len(image)
        return self.factor * image.double().mean((2, 3))


def to_bytes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


REAL, MADE = (to_bytes(30, seed) / 127.5 - 1.0 for seed in (0, 1))


def metric(net, reference=None, measures=None):
    return FeatureMetrics(Embedding(net, "mean"), measures or [Frechet(), KID(5, 10)], reference)


def measure(one, reals):
    run = Measurement([one], SingleProcess(), torch.device("cpu"))
    run.begin(reals)
    for part in (slice(0, 16), slice(16, 30)):
        batch = {"key": [""] * len(MADE[part]), "image": REAL[part], "index": torch.arange(30)[part]}
        run.update_real(batch)
        run.update(MADE[part], batch)
    return {value.name: value for value in run.finish()}, run.failures


def numbers(values):
    return {name: value.value for name, value in values.items()}


def test_real_images_are_looked_at_once_in_memory_and_on_disk(tmp_path):
    net, reals = Means(), ReferenceInfo("these images", tmp_path / "statistics")
    one = metric(net)
    first, _ = measure(one, reals)
    assert net.num_seen == 60
    again, _ = measure(one, reals)
    assert net.num_seen == 90
    other_process = Means()
    other, _ = measure(metric(other_process), reals)
    assert other_process.num_seen == 30
    assert numbers(first) == numbers(again) == numbers(other)
    assert {"fid/mean", "fid_floor/mean", "kid/mean"} <= first.keys()
    assert [value["fid/mean"].metadata["reference"] for value in (first, again, other)] == [
        first["fid/mean"].metadata["reference"]
    ] * 3
    assert len(list((tmp_path / "statistics").iterdir())) == 1


def test_statistics_of_other_images_networks_or_measures_are_not_used(tmp_path):
    measure(metric(Means()), ReferenceInfo("these", tmp_path))
    for changed, identity, measures in [
        (Means(), "those", None),
        (Means(2.0), "these", None),
        (Means(), "these", [Frechet()]),
    ]:
        measure(metric(changed, measures=measures), ReferenceInfo(identity, tmp_path))
        assert changed.num_seen == 60
    unknown = Means()
    measure(metric(unknown), ReferenceInfo())
    assert unknown.num_seen == 60
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_is_computed_anew(tmp_path):
    expected, _ = measure(metric(Means()), ReferenceInfo("these", tmp_path))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="are computed anew"):
        found, _ = measure(metric(Means()), ReferenceInfo("these", tmp_path))
    assert numbers(found) == numbers(expected)
    net = Means()
    measure(metric(net), ReferenceInfo("these", tmp_path))
    assert net.num_seen == 30


def test_a_cache_that_cannot_be_written_costs_itself_only(tmp_path):
    expected, _ = measure(metric(Means()), ReferenceInfo("these"))
    (tmp_path / "statistics").write_text("a file where a folder is to be")
    net = Means()
    one = metric(net)
    with pytest.warns(UserWarning, match="statistics of real images are not kept in .*statistics"):
        found, failures = measure(one, ReferenceInfo("these", tmp_path / "statistics"))
    assert numbers(found) == numbers(expected) and failures == []
    measure(one, ReferenceInfo("these", tmp_path / "statistics"))
    assert net.num_seen == 90  # in memory they are


def adm_file(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def hwc(images):
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_a_file_of_images_is_as_good_as_the_batches(tmp_path):
    expected, _ = measure(metric(Means()), ReferenceInfo())
    path = adm_file(tmp_path / "real.npz", arr_0=hwc(REAL))
    found, failures = measure(metric(Means(), path), ReferenceInfo())
    assert failures == []
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-10)
    assert found["fid/mean"].metadata["num_real"] == 30


def test_mean_and_covariance_of_a_file_are_what_is_compared_with(tmp_path):
    features = Means().image_features(REAL).detach().numpy()
    path = adm_file(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features.T))
    found, _ = measure(metric(Means(), path, [Frechet()]), ReferenceInfo())
    expected, _ = measure(metric(Means(), measures=[Frechet()]), ReferenceInfo())
    assert found["fid/mean"].value == pytest.approx(expected["fid/mean"].value, rel=1e-9)
    assert found["fid/mean"].metadata["num_real"] == "unknown"
    # they win over images in the same file, as in ADM's evaluation
    path = adm_file(tmp_path / "both.npz", mu=features.mean(0) + 1, sigma=np.cov(features.T), arr_0=hwc(REAL))
    moved, _ = measure(metric(Means(), path), ReferenceInfo())
    assert moved["fid/mean"].value > expected["fid/mean"].value + 1
    assert "kid/mean" in moved


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"has \['mu'\], expected 'arr_0' for the views \['features'\]"),
        ({"arr_0": np.zeros((9, 4, 4, 3))}, r"arr_0 is float64 \(9, 4, 4, 3\), expected uint8 images"),
        (
            {"arr_0": np.zeros((9, 8, 8, 3), np.uint8)},
            "real.npz' is of images of side 8, got images of side 4",
        ),
        ({"record": np.array(json.dumps({"resize": "Lanczos"}))}, "resize Lanczos, but mean has none"),
    ],
)
def test_a_file_of_another_kind_is_one_clear_line_and_others_go_on(tmp_path, arrays, message):
    path = adm_file(tmp_path / "real.npz", **arrays)
    run = Measurement([metric(Means(), path), PSNR()], SingleProcess(), torch.device("cpu"))
    run.begin(ReferenceInfo())
    run.update(MADE, {"key": [""] * 30, "image": REAL, "index": torch.arange(30)})
    assert [value.name for value in run.finish()] == ["psnr"]
    assert len(run.failures) == 1
    assert re.search(message, run.failures[0]), run.failures


def test_statistics_of_another_width_fail_what_needs_them_alone(tmp_path):
    path = adm_file(tmp_path / "real.npz", mu=np.zeros(7), sigma=np.eye(7), arr_0=hwc(REAL))
    found, (failure,) = measure(metric(Means(), path), ReferenceInfo())
    assert found.keys() == {"kid/mean", "kid_std/mean"}
    assert "measure Frechet of mean is left out" in failure
    assert "features of widths 3 and 7, expected equal" in failure


def test_images_of_another_side_are_refused_before_any_is_drawn(tmp_path):
    record = np.array(json.dumps({"size": 8, "num": 9}))
    path = adm_file(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3), record=record)
    one = metric(Means(), path, [Frechet()])
    with pytest.raises(ValueError, match=r"real.npz' is of images of side 8, got images of side 4"):
        one.begin(ReferenceInfo(size=4), SingleProcess())
    one.begin(ReferenceInfo(size=8), SingleProcess())
    one.begin(ReferenceInfo(), SingleProcess())


class Fails(Frechet):
    """A measure that has what it needs, and fails."""

    def compute(self, generated, real):
        raise ValueError("too few images")


def test_a_failing_measure_is_left_out_alone(tmp_path):
    expected, _ = measure(metric(Means(), measures=[Frechet(), KID(5, 10)]), ReferenceInfo())
    one = metric(Means(), measures=[Frechet(), Fails(), KID(5, 10)])
    for _ in range(2):
        found, failures = measure(one, ReferenceInfo())
        assert numbers(found) == numbers(expected)
        assert failures == [
            "measure Fails of mean is left out of this evaluation: ValueError: too few images"
        ]


def test_a_failure_is_reported_once(tmp_path):
    one = metric(Means(), measures=[Fails(), Frechet()])
    measure(one, ReferenceInfo())
    one.extractor.forward = None
    _, failures = measure(one, ReferenceInfo())
    assert len(failures) == 1 and "metric FeatureMetrics is left out" in failures[0]


class Elsewhere(Extractor):
    """Has no parameters, like an extractor with a frozen network, and records the device of its images."""

    def __init__(self):
        super().__init__("mean", ("features",))

    def forward(self, images, batch, views):
        raise RuntimeError(f"images are on {images.device.type}")

    def metadata(self):
        return {}


def test_images_of_a_file_go_where_the_network_is(tmp_path):
    path = adm_file(tmp_path / "real.npz", arr_0=hwc(REAL))
    one = FeatureMetrics(Elsewhere(), [Frechet()], path)
    one.to("meta")  # stands for a GPU
    assert one.extractor.device.type == "meta" and not one.extractor.state_dict()
    with pytest.raises(ValueError, match="images are on meta"):
        one.begin(ReferenceInfo(), SingleProcess())


def test_a_missing_or_damaged_file_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz' do not exist"):
        metric(Means(), str(tmp_path / "nowhere.npz"))
    (tmp_path / "page.npz").write_text("<html>")
    _, failures = measure(metric(Means(), str(tmp_path / "page.npz")), ReferenceInfo())
    assert "is no .npz of arrays" in failures[0]


def test_a_measure_of_a_view_that_the_network_lacks_is_refused():
    with pytest.raises(
        ValueError, match=r"need the views \['spatial'\] of Embedding, which has \['features'\]"
    ):
        metric(Means(), measures=[Frechet("spatial", "sfid")])


def test_rows_are_bounded(tmp_path):
    one = FeatureMetrics(Embedding(Means(), "mean"), [Frechet(), KID(5, 10)], max_rows=12)
    values, _ = measure(one, ReferenceInfo())
    all_rows, _ = measure(metric(Means()), ReferenceInfo())
    assert values["fid/mean"].value == all_rows["fid/mean"].value
    assert values["kid/mean"].metadata["num"] == 12 and values["fid/mean"].metadata["num"] == 30
    assert values["kid/mean"].value != all_rows["kid/mean"].value
