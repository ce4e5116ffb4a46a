import pytest
import torch

from ldm.rng import SampleNoise

KEYS = ["a", "b", "c", "d"]


def test_numbers_do_not_depend_on_the_batch_that_a_sample_is_in():
    batch, first, last = SampleNoise(7, KEYS), SampleNoise(7, KEYS[:1]), SampleNoise(7, KEYS[1:])
    for shape in [(2, 3, 3), (5,), (1, 4, 4)]:
        split = torch.cat([first.like(torch.empty(1, *shape)), last.like(torch.empty(3, *shape))])
        assert torch.equal(batch.like(torch.empty(4, *shape)), split)
        assert torch.equal(batch.uniform(), torch.cat([first.uniform(), last.uniform()]))


def test_numbers_do_not_depend_on_the_order_of_the_batch():
    x = torch.empty(4, 3)
    assert torch.equal(SampleNoise(7, KEYS).like(x).flip(0), SampleNoise(7, KEYS[::-1]).like(x))


def test_first_numbers_are_fixed_for_good():
    """Validation curves of different versions compare only while these stay what they are."""
    noise = SampleNoise(0, ["000000"])
    assert torch.allclose(
        noise.like(torch.empty(1, 3)), torch.tensor([[0.8747165, -0.0695343, 0.9251459]]), atol=1e-6
    )
    assert noise.uniform().item() == pytest.approx(0.7340184, abs=1e-6)


def test_seed_key_and_call_all_change_the_numbers():
    x = torch.empty(1, 8)
    noise = SampleNoise(7, ["a"])
    drawn = [noise.like(x), noise.like(x), SampleNoise(8, ["a"]).like(x), SampleNoise(7, ["b"]).like(x)]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 4


def test_dtype_is_a_cast_of_the_same_float32_numbers():
    x = torch.empty(4, 10)
    expected = SampleNoise(1, KEYS).like(x)
    assert torch.equal(SampleNoise(1, KEYS).like(x.bfloat16()), expected.bfloat16())
    assert torch.equal(SampleNoise(1, KEYS).like(x.double()), expected.double())


def test_law_over_keys():
    count = 4000
    keys = [str(i) for i in range(count)]
    normal, uniform = SampleNoise(3, keys).like(torch.empty(count, 4)), SampleNoise(3, keys).uniform()
    assert normal.mean().abs() < 5 / (4 * count) ** 0.5
    assert (normal.var() - 1).abs() < 5 * (2 / (4 * count)) ** 0.5
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.mean() - 0.5).abs() < 5 / (12 * count) ** 0.5


def test_one_row_per_key_is_required():
    with pytest.raises(ValueError, match=r"expected 4 rows.*got 3"):
        SampleNoise(0, KEYS).like(torch.empty(3, 2))
