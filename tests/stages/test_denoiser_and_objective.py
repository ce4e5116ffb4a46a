"""Objectives that want more of a network, and transformers, in a stage: trained, validated and sampled."""

from functools import partial

import pytest
import torch

from ldm.conditioners.label import ClassLabel
from ldm.diffusion.contrastive_flow import ContrastiveFlow
from ldm.diffusion.guidance import ClassifierFree, Interval
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.mean_flow import MeanFlow
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.mean_flow import MeanFlowSampler
from ldm.io.config import config_of
from ldm.latents.space import Pixels
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import build_stage

DIT = partial(DiT, patch_size=2, hidden=16, depth=2, heads=2, options=DiTOptions(qk_norm=True))
UNETS = partial(
    UNet, block_out_channels=(8, 16), layers_per_block=1, attention=(False, True), num_heads=2, norm_groups=4
)
KEYS = ["a", "b", "c", "d"]
BATCH = {"key": KEYS, "label": torch.tensor([0, 1, 2, 0]), "image": torch.rand(4, 3, 8, 8) * 2 - 1}


def stage_of(net, objective, sampler, guidance=None):
    torch.manual_seed(0)
    return Diffusion(Pixels(), ClassLabel(3, width=16), net, objective, sampler, guidance)


@pytest.mark.parametrize("net", [DIT, UNETS], ids=["dit", "unet"])
@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (LearnedVariance(), DDPM(3)),
        (LearnedVariance(), DDIM(3)),
        (MeanFlow(), MeanFlowSampler(2)),
        (MeanFlow(), DDIM(3)),
        (ContrastiveFlow(), DDIM(3)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_stage_trains_validates_and_draws(net, objective, sampler):
    guidance = Interval(ClassifierFree(2.0), 100, 1000)
    stage = stage_of(net, objective, sampler, guidance)
    optimizer = torch.optim.Adam(stage.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        stage.train().losses(BATCH, SampleNoise(0, KEYS))["loss"].backward()
        optimizer.step()
    unused = [name for name, p in stage.named_parameters() if p.grad is None]
    assert unused == []
    with torch.inference_mode():
        means = stage.eval().means(BATCH, SampleNoise(0, KEYS))
    assert sum(count for name, (_, count) in means.items() if "quarter" in name) == 4
    drawn = stage.generate(BATCH, seed=0)
    assert drawn.shape == (4, 3, 8, 8) and drawn.isfinite().all() and drawn.std() > 0
    painted = stage.redraw(BATCH, 0, BATCH["image"], mask=torch.ones(1, 8, 8))
    assert painted.shape == (4, 3, 8, 8)
    again = build_stage(config_of(stage))
    again.load_state_dict(stage.state_dict())
    torch.testing.assert_close(again.eval().generate(BATCH, seed=0), drawn)


def test_the_learned_variance_reaches_the_sampler():
    stage = stage_of(UNETS, LearnedVariance(), DDPM(4))
    first = stage.eval().generate(BATCH, seed=0)
    with torch.no_grad():
        stage.denoiser.conv_out.bias[3:] += 3.0
    assert not torch.equal(stage.generate(BATCH, seed=0), first)
    stage.sampler = DDIM(4)
    without = stage.generate(BATCH, seed=0)
    with torch.no_grad():
        stage.denoiser.conv_out.bias[3:] -= 3.0
    assert torch.equal(stage.generate(BATCH, seed=0), without)


def test_average_velocities_need_a_model_that_has_them():
    with pytest.raises(
        ValueError, match=r"model\.sampler: MeanFlowSampler needs the objective MeanFlow, got"
    ):
        stage_of(DIT, LearnedVariance(), MeanFlowSampler())
