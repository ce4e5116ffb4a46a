"""Denoisers of the recipes have the parameters that are published, counted without giving them memory."""

import pytest
import torch

from ldm import nets
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.routing import Sprint
from ldm.runs.recipe import merged
from ldm.types import DenoiserDims

CLASSES = 1001
SPRINT = 2 * 768 * 768 + 768 + 768  # layer and bias that join both paths, and what stands for absent tokens
SIZES = {  # with the vectors of classes, and without fixed positions
    "cifar10/ddpm": (DenoiserDims(3), 35_746_307),
    "faces/ldm-4-ffhq": (DenoiserDims(3), 274_056_163),
    "faces/ldm-4-celeba-hq": (DenoiserDims(3), 274_056_163),
    "imagenet/ldm-4": (DenoiserDims(3, tokens=512), 400_920_579 + CLASSES * 512),
    "imagenet/dit-b-4": (DenoiserDims(4, vector=768, output=8), 130_426_496),
    "imagenet/dit-xl-2": (DenoiserDims(4, vector=1152, output=8), 675_129_632 - 256 * 1152),
    "imagenet/lightningdit-b-1": (DenoiserDims(32, vector=768), 130_340_384),
    "imagenet/sr-dit-b-1": (DenoiserDims(32, vector=768), 130_329_654 + SPRINT),
    "diffusion/dit": (DenoiserDims(4, tokens=512), 606_712_912),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_has_the_published_number_of_parameters(name):
    dims, expected = SIZES[name]
    model = merged(name)["model"]["init_args"]
    arguments = dict(model["denoiser"]["init_args"])
    if "options" in arguments:
        arguments["options"] = DiTOptions(**arguments["options"])
    if "routing" in arguments:
        arguments["routing"] = Sprint(**arguments["routing"]["init_args"])
    with torch.device("meta"):
        net = getattr(nets, model["denoiser"]["class_path"])(dims, **arguments)
    found = sum(p.numel() for p in net.parameters())
    conditioner = model["conditioner"]
    label = conditioner.get("init_args", {}) if isinstance(conditioner, dict) else {}
    if "num_classes" in label:
        assert label["width"] in (dims.vector, dims.tokens)
        found += (label["num_classes"] + 1) * label["width"]
    assert found == expected
