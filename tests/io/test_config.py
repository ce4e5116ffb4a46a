"""Arguments that build an object in Python, as a configuration states them."""

import copy
from functools import partial

import pytest

from ldm.conditioners.none import Unconditional
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.schedule import Cosine
from ldm.io.config import config_of
from ldm.latents.space import Pixels
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet
from ldm.optim.recipes import AdamW, Muon, SquareRootScaling
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import build_stage

SMALL = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}


def diffusion(denoiser, **more):
    return Diffusion(Pixels(), Unconditional(), denoiser, **more)


def test_a_stage_is_rebuilt_from_its_own_arguments():
    unet = partial(UNet, attention=(False, False), **SMALL)
    stage = diffusion(unet, objective=Objective(Cosine(50)), sampler=DDIM(3), optimizer=Muon(lr=0.5))
    config = config_of(stage)
    again = build_stage(config)
    assert again.state_dict().keys() == stage.state_dict().keys()
    assert again.objective.schedule.num_steps == 50 and again.sampler.num_steps == 3
    assert again.optimizer.lr == 0.5


def test_positions_names_and_defaults():
    recipe = AdamW(1e-3, scaling=SquareRootScaling(8))
    scaling = {"class_path": "ldm.optim.SquareRootScaling", "init_args": {"batch": 8}}
    expected = {"class_path": "ldm.optim.AdamW", "init_args": {"lr": 1e-3, "scaling": scaling}}
    assert config_of(recipe) == expected
    assert config_of(copy.deepcopy(recipe)) == expected


def test_unsupported_features_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.denoiser: a checkpoint cannot hold a function, expected"):
        config_of(diffusion(lambda dims: UNet(dims, attention=(False, False), **SMALL)))

    class Own(Autoencoder):
        pass

    with pytest.raises(ValueError, match=r"model: a checkpoint cannot name .*Own: move the class into a"):
        config_of(Own(KLAutoencoder(latent_channels=3, **SMALL)))
