"""Measures of features: closed forms, known cases, and torch-fidelity on the same features."""

import math

import pytest
import torch
from feature_sets import compute, normal, unit
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import CMMD, KID, unbiased_mmd2
from ldm.metrics.neighbours import Neighbours, squared_distances
from ldm.metrics.retrieval import Retrieval, recall_at_1


def features(x, y):
    return {"features": x}, {"features": y}


def test_kid_is_torch_fidelitys():
    x, y = normal(300, 24, 0) + 0.2, normal(260, 24, 1)
    mine = compute(KID(num_subsets=20, subset_size=100, seed=3), *features(x, y))
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=100, rng_seed=3, verbose=False)
    assert mine["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert mine["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_kid_is_the_polynomial_moments_differences_without_bias():
    # k(x, y) = (xy + 1)^3 in one dimension: MMD^2 = 3 (m1 - m1')^2 + 3 (m2 - m2')^2 + (m3 - m3')^2
    x, y = normal(4000, 1, 1) + 0.5, 0.5 * normal(4000, 1, 2)
    exact = sum(w * (0.0 - m) ** 2 for w, m in [(3, 0.5), (3, 1.25 - 0.25), (1, 0.125 + 1.5)])
    assert unbiased_mmd2(x, y) == pytest.approx(exact, rel=0.1)
    assert abs(unbiased_mmd2(x, normal(4000, 1, 3) + 0.5)) < 0.02 * exact


def test_kid_takes_all_images_where_there_are_fewer_than_a_subset():
    x, y = normal(50, 8, 0), normal(60, 8, 1)
    values = compute(KID(num_subsets=3, subset_size=50), *features(x, y[:50]))
    assert values["kid"] == pytest.approx(unbiased_mmd2(x, y[:50]), rel=1e-10)
    assert values["kid_std"] == pytest.approx(0.0, abs=1e-12)


def test_cmmd_of_two_points_is_known():
    x, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    # k(x, x) + k(y, y) - 2 k(x, y), |x - y|^2 = 2
    expected = 1000 * 2 * (1 - math.exp(-2 / (2 * 10**2)))
    assert compute(CMMD(), {"embedding": x}, {"embedding": y})["cmmd"] == pytest.approx(expected, rel=1e-12)


def test_cmmd_counts_all_pairs_and_is_zero_for_equal_sets():
    x, y = unit(40, 6, 0), unit(30, 6, 1)
    kernel = lambda a, b: torch.exp(-(torch.cdist(a, b) ** 2) / 200.0).mean()  # noqa: E731
    expected = 1000 * float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert compute(CMMD(), {"embedding": x}, {"embedding": y})["cmmd"] == pytest.approx(expected, rel=1e-6)
    assert compute(CMMD(), {"embedding": x}, {"embedding": x.flip(0)})["cmmd"] == pytest.approx(0, abs=1e-9)


def test_inception_score_is_torch_fidelitys():
    logits = 3 * normal(205, 12, 0)
    mine, theirs = compute(InceptionScore(), {"logits": logits}), isc_features_to_metric(logits)
    assert mine["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert mine["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-10)


def test_inception_score_lies_between_one_and_the_number_of_classes():
    sure = 100.0 * torch.eye(7).double().repeat(30, 1)
    assert compute(InceptionScore(1), {"logits": sure})["is"] == pytest.approx(7.0, rel=1e-12)
    assert compute(InceptionScore(1), {"logits": normal(1, 7, 0).repeat(30, 1)})["is"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="got 9 images for 10 splits"):
        compute(InceptionScore(), {"logits": sure[:9]})


def test_precision_and_recall_are_torch_fidelitys():
    x, y = normal(150, 6, 0) * 0.8, normal(170, 6, 1) + 0.5
    mine = compute(Neighbours(k=3), *features(x, y))
    precision, recall = calculate_precision_recall_full(x, y, 3)
    assert 0.3 < precision < 0.99 and 0.1 < recall < 0.9
    assert mine["precision"] == pytest.approx(precision, rel=1e-6)
    assert mine["recall"] == pytest.approx(recall, rel=1e-6)


def test_density_and_coverage_by_counting():
    x, y, k = normal(60, 3, 0) * 0.5, normal(50, 3, 1), 4
    radius = torch.cdist(y, y).sort(1).values[:, k]
    inside = [[bool((a - b).norm() <= r) for b, r in zip(y, radius, strict=True)] for a in x]
    mine = compute(Neighbours(k_density=k), *features(x, y))
    assert mine["density"] == pytest.approx(sum(map(sum, inside)) / (k * 60), rel=1e-12)
    assert mine["coverage"] == pytest.approx(sum(map(any, zip(*inside, strict=True))) / 50, rel=1e-12)


def test_equal_sets_are_precise_and_covered_and_far_ones_are_not():
    x = normal(100, 5, 0)
    same = compute(Neighbours(), *features(x, x.clone()))
    assert [same[name] for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
    assert 0.9 < same["density"] <= 1.2
    far = compute(Neighbours(), *features(x + 100.0, x))
    assert set(far.values()) == {0.0}


def test_one_image_again_and_again_is_precise_and_poor():
    x = normal(100, 5, 0)
    values = compute(Neighbours(), *features(x[:1].repeat(80, 1), x))
    assert values["precision"] == 1.0
    assert values["recall"] == pytest.approx(0.01) and values["coverage"] < 0.15


def test_copies_are_at_distance_zero():
    x = 10.0 * normal(50, 300, 0).float().double()
    assert torch.equal(squared_distances(x, x.clone()).diagonal(), torch.zeros(50).double())


def test_clip_score_is_a_mean():
    agreement = torch.tensor([[1.0], [0.8], [0.0]], dtype=torch.float64)
    assert compute(CLIPScore(), {"agreement": agreement})["clip_score"] == pytest.approx(60.0, rel=1e-12)


def test_recall_counts_the_nearest_in_each_direction():
    text, image = torch.eye(4), torch.eye(4)
    image[2] = torch.tensor([0.0, 0.0, 0.6, 0.8])  # nearer to another caption, yet its own caption's nearest
    assert recall_at_1(image, text) == {"image_to_text": 0.75, "text_to_image": 1.0}
    assert recall_at_1(text, image) == {"image_to_text": 1.0, "text_to_image": 0.75}
    rows = {"embedding": image, "text": text, "caption": torch.arange(4)}
    values = compute(Retrieval((1, 2, 10)), rows)
    assert values == {
        "image_to_text@1": 0.75,
        "text_to_image@1": 1.0,
        "image_to_text@2": 1.0,
        "text_to_image@2": 1.0,
        "image_to_text@10": 1.0,
        "text_to_image@10": 1.0,
    }


def test_recall_takes_equal_captions_for_equally_right():
    image, text = torch.eye(3)[[0, 0, 2]], torch.eye(3)[[0, 0, 2]]
    assert recall_at_1(image, text)["image_to_text"] == pytest.approx(2 / 3)
    assert recall_at_1(image, text, ["a", "a", "b"])["image_to_text"] == 1.0
    with pytest.raises(ValueError, match="got 3 images and 2 captions"):
        recall_at_1(image, text[:2])


def test_the_record_of_kid_has_the_subsets_that_were_drawn():
    measure = KID(num_subsets=2, subset_size=1000)
    compute(measure, *features(normal(50, 8, 0), normal(60, 8, 1)))
    assert measure.metadata()["subset_size"] == 50
