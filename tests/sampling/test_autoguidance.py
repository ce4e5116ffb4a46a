"""Guidance by a weaker model: a network in the hands of a stage that must not train it."""

import pytest
import torch

from ldm.diffusion.guidance import ClassifierFree, Interval, Unguided
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import Cosine
from ldm.evaluation.record import describe_sampling
from ldm.io.checkpoint import Checkpoint
from ldm.sampling.autoguidance import Autoguidance
from ldm.stages.load import build_stage

CONFIG = {
    "class_path": "ldm.stages.diffusion.Diffusion",
    "init_args": {
        "latents": {"class_path": "ldm.latents.space.Pixels"},
        "conditioner": {"class_path": "ldm.conditioners.label.ClassLabel", "init_args": {"num_classes": 3}},
        "denoiser": {
            "class_path": "ldm.nets.unet.UNet",
            "init_args": {
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "attention": [False, False],
                "norm_groups": 4,
            },
        },
        "sampler": {"class_path": "ldm.diffusion.samplers.ddim.DDIM", "init_args": {"num_steps": 2}},
    },
}
BATCH = {"key": ["a", "b"], "label": torch.tensor([0, 2])}


def model(seed):
    torch.manual_seed(seed)
    stage = build_stage(CONFIG).eval()
    for parameter in stage.parameters():  # the last convolution begins at zero
        torch.nn.init.normal_(parameter, std=0.1)
    stage.image_size = 8
    return stage


@pytest.fixture
def weaker(tmp_path):
    stage = model(1)
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    torch.save(state, tmp_path / "weaker.ckpt")
    return str(tmp_path / "weaker.ckpt")


def test_it_extrapolates_from_the_weaker_model_through_the_stronger(weaker):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    strong, weak = (each.cond(BATCH)(x, t) for each in (model(2), model(1)))
    for scale in (0.0, 1.0, 2.0):
        guided = Autoguidance(weaker, scale)(model(2).estimates(), BATCH)(x, t)
        assert torch.allclose(guided, weak + scale * (strong - weak), rtol=1e-4, atol=1e-4)
    assert (strong - weak).abs().max() > 0.1


@pytest.mark.parametrize("wrap", [lambda guidance: guidance, lambda guidance: Interval(guidance, 0, 999)])
def test_the_weaker_model_moves_with_the_stage_but_is_no_submodule(weaker, wrap):
    stage = model(2)
    names, count = list(stage.state_dict()), len(list(stage.parameters()))
    guidance = Autoguidance(weaker, 2.0)
    stage.guidance = wrap(guidance)
    assert (list(stage.state_dict()), len(list(stage.parameters()))) == (names, count)
    stage.train()
    assert not guidance.module.training
    stage.to(torch.float64)
    assert next(guidance.module.parameters()).dtype == torch.float64


def test_any_guidance_may_replace_any_other(weaker):
    """The override of ldm.sample and of the evaluation."""
    stage = model(2)
    for guidance in (
        Autoguidance(weaker, 2.0),
        Unguided(),
        Interval(ClassifierFree(2.0), 0, 500),
        Unguided(),
    ):
        stage.guidance = guidance
        assert stage.guidance is guidance
        assert stage.generate(BATCH, seed=0).isfinite().all()


def test_a_weaker_model_of_another_schedule_or_other_latents_is_refused(weaker):
    guidance, stage = Autoguidance(weaker, 2.0), model(2)
    stage.objective = Objective(Cosine(num_steps=100))
    with pytest.raises(
        ValueError, match=r"another noise schedule, .* of 1000 steps, than .* Cosine of 100 steps"
    ):
        guidance(stage.estimates(), BATCH)
    stage = model(2)
    stage.latents.channels = 4
    with pytest.raises(ValueError, match="in the latents of another autoencoder"):
        guidance(stage.estimates(), BATCH)


def test_the_weaker_model_is_in_the_metadata_of_images_and_cannot_be_replaced(weaker):
    stage = model(2)
    stage.guidance = Interval(Autoguidance(weaker, 2.0), 0, 999)
    assert stage.upstream() == {weaker: Checkpoint.open(weaker).sha256}
    assert Checkpoint.open(weaker).sha256 in describe_sampling(stage)["guidance"]
    saved = {}
    stage.on_save_checkpoint(saved)
    other = torch.load(weaker, weights_only=True)
    torch.save({**other, "progress": {"steps": 1, "samples": 7}}, weaker)
    stage.guidance = Autoguidance(weaker, 2.0)
    with pytest.raises(ValueError, match=r"upstream checkpoint '.*weaker.ckpt' changed"):
        stage.check_upstream(saved)
