"""Class labels, and what all conditioners do."""

import warnings

import pytest
import torch

from ldm.conditioners.label import ClassLabel
from ldm.conditioners.none import Unconditional
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.ddim import DDIM
from ldm.latents.space import Pixels
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion


def labelled(*labels):
    return {"key": [f"k{i}" for i in range(len(labels))], "label": torch.tensor(labels)}


def unet(widths):
    return UNet(widths, [8, 8], layers_per_block=1, attention=[False, False], norm_groups=4)


def test_a_fraction_of_training_samples_gets_the_null_condition():
    conditioner = ClassLabel(2, 4, dropout=0.3)
    data = labelled(*[1] * 4000)
    vectors = conditioner.dropped(data, SampleNoise(0, data["key"])).vector
    dropped = (vectors == conditioner.null(data).vector).all(1)
    assert abs(dropped.float().mean() - 0.3) < 3 * (0.3 * 0.7 / 4000) ** 0.5


def test_one_number_per_sample_is_drawn_whatever_the_dropout():
    data = labelled(0, 1, 1)
    after = []
    for conditioner in (ClassLabel(2, 4, dropout=0.0), ClassLabel(2, 4, dropout=0.9), Unconditional()):
        noise = SampleNoise(0, data["key"])
        conditioner.dropped(data, noise)
        after.append(noise.uniform())
    once = SampleNoise(0, data["key"])
    once.uniform()
    assert all(torch.equal(numbers, after[0]) for numbers in [*after, once.uniform()])


def test_validation_drops_nothing():
    torch.manual_seed(0)
    stage = Diffusion(Pixels(), ClassLabel(2, 4, dropout=1.0), unet)
    data = {**labelled(0, 1), "image": torch.zeros(2, 3, 8, 8)}

    def gradient():
        stage.zero_grad()
        stage.losses(data, SampleNoise(0, data["key"]))["loss"].backward()
        return stage.conditioner.embedding.weight.grad.abs().sum(1) > 0

    assert gradient().tolist() == [False, False, True], "training at dropout 1 sees the null row alone"
    stage.eval()
    assert gradient().tolist() == [True, True, False]


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_the_model_lacks_is_named_before_it_moves_to_the_device(label):
    stage = Diffusion(Pixels(), ClassLabel(3, 4), unet)
    data = {**labelled(0, label), "image": torch.zeros(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=rf"sample 'k1': label {label} is no class .* expected 0 to 2"):
        stage.validate_batch(data)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"the batch has no label: add it to data\.fields"):
        ClassLabel(3)({"key": ["a"]})


@pytest.mark.parametrize(
    ("dropout", "scale", "warns"), [(0.0, 3.0, True), (0.0, 1.0, False), (0.1, 3.0, False)]
)
def test_guidance_by_a_condition_that_training_never_dropped_warns(dropout, scale, warns):
    stage = Diffusion(Pixels(), ClassLabel(2, 4, dropout=dropout), unet, sampler=DDIM(num_steps=1))
    stage.guidance, stage.image_size = ClassifierFree(scale), 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stage.eval().generate(labelled(1), seed=0)
    said = [
        str(each.message) for each in caught if "which this model was not trained for" in str(each.message)
    ]
    assert len(said) == warns


def test_a_class_may_be_a_token_and_begin_small():
    torch.manual_seed(0)
    plain = ClassLabel(3, 4)
    torch.manual_seed(0)
    token = ClassLabel(3, 4, std=0.02, as_token=True)
    assert (token.token_width, token.vector_width) == (4, None)
    data = labelled(0, 2)
    torch.testing.assert_close(token(data).tokens, 0.02 * plain(data).vector[:, None])
    torch.testing.assert_close(token.null(data).tokens, 0.02 * plain.null(data).vector[:, None])
