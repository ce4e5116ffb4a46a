"""The Fréchet distance: closed forms, another implementation, and independence of the split."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.metrics.frechet import FrechetDistance, GaussianMoments, frechet_distance

scipy_linalg = pytest.importorskip("scipy.linalg")


def moments(features):
    result = GaussianMoments()
    result.update(features)
    return result


def normal(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, deviation, count=500):
    """Samples whose mean and covariance are exactly ``mean`` and ``diag(deviation)^2``."""
    x = normal(count, len(mean), 0)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T.cov())
    white = torch.linalg.solve_triangular(root, x.T, upper=False).T
    return white * torch.tensor(deviation) + torch.tensor(mean)


def test_known_distance_of_axis_parallel_gaussians():
    a = moments(with_moments([0.0, 1.0, 2.0], [1.0, 2.0, 0.5]))
    b = moments(with_moments([3.0, 1.0, -2.0], [2.0, 2.0, 0.0]))
    # sum of (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + 1 + 0 + 0.25, rel=1e-9)


def test_agrees_with_scipys_square_root():
    a, b = normal(300, 16, 1) @ normal(16, 16, 2), normal(200, 16, 3) @ normal(16, 16, 4) + 0.3
    one, two = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy_linalg.sqrtm(one @ two).real
    gap = a.mean(0).numpy() - b.mean(0).numpy()
    expected = gap @ gap + np.trace(one + two - 2 * root)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_distance_zero_also_with_fewer_pictures_than_features():
    for count in (200, 10):
        x = normal(count, 32, 5)
        assert frechet_distance(moments(x), moments(x)) == pytest.approx(0.0, abs=1e-5)


def test_moments_are_mean_and_covariance_for_any_split(tmp_path):
    x = normal(101, 7, 6)
    parts = moments(x[:1]).merge(moments(x[1:64])).merge(GaussianMoments()).merge(moments(x[64:]))
    parts.save(tmp_path / "real.npz")
    parts = GaussianMoments.load(tmp_path / "real.npz")
    assert parts.count == 101
    torch.testing.assert_close(parts.mean, x.mean(0))
    torch.testing.assert_close(parts.covariance, x.T.cov())


def test_moments_keep_float64_far_from_zero():
    x = normal(1000, 3, 7).float() + 1000.0
    torch.testing.assert_close(moments(x).covariance, x.double().T.cov(), rtol=1e-6, atol=1e-8)


def test_too_few_pictures_and_other_features_are_refused():
    with pytest.raises(ValueError, match="got 1 and 5 pictures, expected at least 2 of each"):
        frechet_distance(moments(normal(1, 2, 0)), moments(normal(5, 2, 0)))
    some = moments(normal(3, 4, 0))
    with pytest.raises(ValueError, match="features have width 5, expected 4"):
        some.update(normal(3, 5, 0))


class Flat(nn.Module):
    def image_features(self, image):
        return image.flatten(1)[:, :6]


def test_metric_reports_distance_and_floor():
    image = normal(400, 12, 8).view(400, 3, 2, 2).float()
    metric = FrechetDistance(Flat(), name="fid/flat")
    for start in range(0, 400, 100):
        part = image[start : start + 100]
        metric.update(part + 2.0, {"image": part, "key": [f"{i}" for i in range(start, start + 100)]})
    values = metric.compute()
    # the same pictures, shifted by 2 in each of 6 features
    assert values["fid/flat"] == pytest.approx(6 * 4.0, rel=1e-5)
    assert 0.0 < values["fid/flat_floor"] < 0.5
    metric.reset()
    assert metric.compute() == {}
