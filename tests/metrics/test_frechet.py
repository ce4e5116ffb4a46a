"""The Fréchet distance: closed forms, other implementations, and independence of the split."""

import numpy as np
import pytest
import torch
from feature_sets import compute, normal

from ldm.metrics.frechet import Frechet, frechet_distance
from ldm.metrics.moments import Gaussian, GaussianMoments

scipy_linalg = pytest.importorskip("scipy.linalg")


def moments(features):
    result = GaussianMoments()
    result.update(features)
    return result


def distance(a, b):
    return frechet_distance(moments(a).gaussian, moments(b).gaussian)


def by_gram_matrix(a, b):
    """The distance without any covariance: its last term is a nuclear norm of the centred sets' product."""
    one, two = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    overlap = torch.linalg.matrix_norm(one @ two.T, "nuc")
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + one.square().sum() + two.square().sum() - 2 * overlap)


def test_known_distance_of_axis_parallel_gaussians():
    a = Gaussian(torch.tensor([0.0, 1.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 0.25]).double()))
    b = Gaussian(torch.tensor([3.0, 1.0, -2.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 0.0]).double()))
    # sum of (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + 1 + 0 + 0.25, rel=1e-12)


def test_rotated_gaussians_are_as_far_apart_as_before():
    turn = torch.linalg.qr(normal(5, 5, 0)).Q
    a, b = normal(400, 5, 1) * torch.arange(1, 6), normal(300, 5, 2) + 1.0
    assert distance(a @ turn, b @ turn) == pytest.approx(distance(a, b), rel=1e-10)


def test_agrees_with_scipys_square_root():
    a, b = normal(300, 16, 1) @ normal(16, 16, 2), normal(200, 16, 3) @ normal(16, 16, 4) + 0.3
    one, two = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy_linalg.sqrtm(one @ two).real
    gap = a.mean(0).numpy() - b.mean(0).numpy()
    expected = gap @ gap + np.trace(one + two - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [12, 64, 65, 66, 200])
def test_no_digits_are_lost_with_fewer_images_than_features(count):
    a, b = normal(count, 64, 1), normal(40, 64, 2) * 1.3
    assert distance(a, b) == pytest.approx(by_gram_matrix(a, b), rel=1e-10)


def test_equal_sets_are_at_distance_zero_also_with_fewer_images_than_features():
    for count in (200, 10):
        x = normal(count, 32, 5)
        assert distance(x, x) == pytest.approx(0.0, abs=1e-10)


def test_moments_are_mean_and_covariance_for_any_split():
    x = normal(101, 7, 6)
    parts = moments(x[:1]).merge(moments(x[1:64])).merge(GaussianMoments()).merge(moments(x[64:]))
    assert parts.count == 101
    torch.testing.assert_close(parts.mean, x.mean(0))
    torch.testing.assert_close(parts.covariance, x.T.cov())


def test_moments_keep_float64_far_from_zero():
    x = normal(1000, 3, 7).float() + 1000.0
    torch.testing.assert_close(moments(x).covariance, x.double().T.cov(), rtol=1e-6, atol=1e-8)


def test_too_few_images_and_other_features_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        distance(normal(1, 2, 0), normal(5, 2, 0))
    some = moments(normal(3, 4, 0))
    with pytest.raises(ValueError, match="features have width 5, expected 4"):
        some.update(normal(3, 5, 0))
    with pytest.raises(ValueError, match="widths 4 and 5, expected equal"):
        distance(normal(9, 4, 0), normal(9, 5, 0))


def test_the_floor_is_the_distance_of_two_halves_of_the_real_images():
    real = normal(400, 6, 8)
    values = compute(Frechet(), {"features": real + 2.0}, {"features": real})
    assert values["fid"] == pytest.approx(6 * 4.0, rel=1e-10)  # the same images, shifted
    assert values["fid_floor"] == pytest.approx(distance(real[::2], real[1::2]), rel=1e-10)
    assert 0.0 < values["fid_floor"] < 0.5


def test_too_few_images_for_full_rank_are_reported_with_the_two_numbers():
    with pytest.warns(UserWarning, match="fid: 30 generated images for a covariance of rank 64"):
        compute(Frechet(), {"features": normal(30, 64, 0)}, {"features": normal(70, 64, 1)})
