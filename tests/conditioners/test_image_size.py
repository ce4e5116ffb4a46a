"""Size and crop of an image as a condition."""

import pytest
import torch

from ldm.conditioners.composite import Composite
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.size import ImageSize
from ldm.rng import SampleNoise

SIZES = torch.tensor([[512.0, 768.0, 0.0, 128.0, 256.0, 256.0], [64.0, 48.0, 3.0, 0.0, 192.0, 320.0]])


def sized(sizes=SIZES):
    return {"key": [f"k{i}" for i in range(len(sizes))], "size": sizes}


def test_numbers_are_embedded_as_diffusers_embeds_them():
    """Its SDXL U-Net takes the sizes in this order, through ``Timesteps`` and ``TimestepEmbedding``."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(0)
    ours = ImageSize(24, 32)
    waves = embeddings.Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
    layers = embeddings.TimestepEmbedding(6 * 32, 24)
    layers.load_state_dict(ours.embedding.state_dict())
    expected = layers(waves(SIZES.flatten()).reshape(2, -1))
    found = ours(sized()).vector
    assert found.shape == (2, 24) == (2, ours.vector_width)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_number_matters():
    torch.manual_seed(0)
    conditioner = ImageSize(16, 32)
    for column in range(6):
        other = SIZES[:1].clone()
        other[:, column] += 16.0
        both = conditioner(sized(torch.cat([SIZES[:1], other]))).vector
        assert (both[0] - both[1]).abs().max() > 1e-3


def test_it_joins_others_and_guidance_keeps_it():
    """A label is dropped and the size is not: without the label, the size still conditions."""
    torch.manual_seed(0)
    label, size = ClassLabel(3, 16), ImageSize(16, 32)
    both = Composite([label, size])
    batch = {**sized(), "label": torch.tensor([0, 2])}
    assert both.reads == ("label", "size")
    assert both.vector_width == 16
    torch.testing.assert_close(both(batch).vector, label(batch).vector + size(batch).vector)
    torch.testing.assert_close(both.null(batch).vector, label.null(batch).vector + size(batch).vector)


def test_dropout_gives_the_null_condition():
    torch.manual_seed(0)
    conditioner = ImageSize(16, 32, dropout=1.0)
    dropped = conditioner.dropped(sized(), SampleNoise(0, ["k0", "k1"])).vector
    torch.testing.assert_close(dropped, conditioner.null(sized()).vector)
    assert (dropped - conditioner(sized()).vector).abs().max() > 1e-3


def test_a_batch_without_sizes_is_refused():
    with pytest.raises(ValueError, match=r"ImageSize conditions on size, but the batch has no size"):
        ImageSize()({"key": ["a"]})
