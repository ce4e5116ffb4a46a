"""The figures of benchmarks.perceptual: nothing differs from itself, and what is blurred is farther away."""

import pytest
import torch

from benchmarks.perceptual import Judge, frechet, measure, reconstruct, write_sheet


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(8, (8, 8)).eval()


@pytest.fixture(scope="module")
def real():
    image = torch.randint(0, 256, (65, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return {"key": [], "image": image.to(torch.uint8), "label": torch.zeros(65, dtype=torch.int64)}


def test_images_do_not_differ_from_themselves_and_blurred_ones_do(judge, real):
    same = dict(measure(judge, judge, real["image"], real))
    blurred = torch.nn.functional.avg_pool2d(real["image"].float(), 3, 1, 1).to(torch.uint8)
    other = dict(measure(judge, judge, blurred, real))
    for name in same:
        if "distance" in name:
            assert same[name] == pytest.approx(0.0, abs=1e-6) and other[name] > 1e-4, name
    assert same["SSIM"] == pytest.approx(1.0) and other["SSIM"] < 0.9 and other["PSNR, dB"] < 20


def test_the_distance_of_sets_that_are_shifted_is_the_shift_squared():
    features = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet(features, features + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25.0)


def test_all_images_are_reconstructed_in_their_order_and_laid_out_in_rows(real, tmp_path):
    class Same:
        def generate(self, batch, seed):
            return batch["image"]

    images = reconstruct(Same(), real["image"])
    assert torch.equal(images, real["image"])
    write_sheet(tmp_path / "x.png", {"a": images[:12], "b": images[12:24]})
    assert (tmp_path / "x.png").stat().st_size > 0
