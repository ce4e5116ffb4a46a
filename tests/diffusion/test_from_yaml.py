"""The mathematics as an experiment's YAML names it: classes by import path, nested in one another."""

import jsonargparse
import pytest
import torch
import yaml

from ldm.diffusion.guidance import Guidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.schedule import ScaledLinear, ZeroTerminalSNR

OBJECTIVE = """
part:
  schedule:
    class_path: ldm.diffusion.schedule.ZeroTerminalSNR
    init_args: {schedule: {class_path: ldm.diffusion.schedule.ScaledLinear}}
  prediction: {class_path: ldm.diffusion.prediction.Velocity}
  weighting: {class_path: ldm.diffusion.weighting.SoftMinSNR, init_args: {gamma: 3}}
  timesteps:
    class_path: ldm.diffusion.timesteps.LowDiscrepancy
    init_args: {of: {class_path: ldm.diffusion.timesteps.LogitNormal, init_args: {mean: -0.5}}}
  offset_noise: 0.1
"""


EDM = """
part:
  schedule: {class_path: ldm.diffusion.VarianceExploding, init_args: {sigma_max: 160}}
  prediction: {class_path: ldm.diffusion.prediction.EDM, init_args: {sigma_data: 1}}
  timesteps: {class_path: ldm.diffusion.timesteps.LogNormal, init_args: {mean: -0.5}}
"""


def parsed(kind, text):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    if kind is Objective:
        parser.add_class_arguments(kind, "part")
    else:
        parser.add_subclass_arguments(kind, "part")
    return parser.instantiate_classes(parser.parse_object(yaml.safe_load(text))).part


def test_an_objective():
    objective = parsed(Objective, OBJECTIVE)
    assert torch.equal(objective.schedule.alpha, ZeroTerminalSNR(ScaledLinear()).alpha)
    assert (objective.weighting.gamma, objective.timesteps.of.mean, objective.offset_noise) == (3, -0.5, 0.1)


def test_edm():
    objective = parsed(Objective, EDM)
    assert (objective.schedule.alpha.min(), objective.prediction.sigma_data) == (1, 1)
    assert (objective.timesteps.mean, objective.timesteps.std) == (-0.5, 1.2)
    assert objective.schedule.sigma[-1].item() == pytest.approx(160)
    model = torch.nn.Linear(3, 3)
    x0 = torch.randn(8, 3)
    t, noise = objective.draw(x0, position=torch.arange(8))
    assert objective.loss(lambda x, t: model(x), x0, noise, t).isfinite().all()


@pytest.mark.parametrize("name", ["ddpm.DDPM", "ddim.DDIM", "dpm_solver.DPMSolver", "dpm_solver.DPMSolverSDE",
    "euler.Euler", "euler.EulerAncestral", "heun.Heun", "plms.PLMS", "unipc.UniPC"])  # fmt: skip
@pytest.mark.parametrize("spacing", ["Trailing", "Leading", "Linspace", "Karras"])
def test_a_sampler_and_its_spacing(name, spacing):
    sampler = parsed(
        Sampler,
        f"part: {{class_path: ldm.diffusion.samplers.{name}, init_args: {{num_steps: 7, "
        f"spacing: {{class_path: ldm.diffusion.samplers.spacing.{spacing}}}}}}}",
    )
    assert f"{type(sampler).__module__}.{type(sampler).__name__}" == f"ldm.diffusion.samplers.{name}"
    assert type(sampler.spacing).__name__ == spacing
    if (name, spacing) == ("plms.PLMS", "Karras"):  # its weights are those of equal steps
        with pytest.raises(ValueError, match=r"PLMS got steps of 17.* to 281.* timesteps by spacing Karras"):
            sampler.steps(ScaledLinear())
    else:
        assert len(sampler.steps(ScaledLinear())) == 7


def test_guidance_within_guidance():
    guidance = parsed(
        Guidance,
        """
part:
  class_path: ldm.diffusion.guidance.Interval
  init_args:
    guidance: {class_path: ldm.diffusion.guidance.Rescaled, init_args: {scale: 5, rescale: 0.5}}
    low: 100
    high: 800
""",
    )
    assert (guidance.guidance.scale, guidance.guidance.rescale, guidance.low, guidance.high) == (
        5,
        0.5,
        100,
        800,
    )
