"""Schedules by diffusers' names and by ours: the same tables, and a name where there is one."""

import pytest
import torch

from ldm.diffusion import prediction, schedule
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.spacing import Karras, Leading, Linspace, Trailing
from ldm.interop.model import Process
from ldm.interop.schedules import betas, build, named, process, recognised, sampler, scheduler_config

diffusers = pytest.importorskip("diffusers")

SCHEDULES = [
    schedule.ScaledLinear(),
    schedule.ScaledLinear(100, 0.001, 0.05),
    schedule.Linear(),
    schedule.Linear(250, 0.0004, 0.08),
    schedule.Cosine(),
    schedule.Cosine(50),
    schedule.Cosine(50, max_beta=1.0),
    schedule.Cosine(200, offset=0.02),
    schedule.ZeroTerminalSNR(schedule.ScaledLinear()),
    schedule.ZeroTerminalSNR(schedule.Linear(400, 0.002, 0.02)),
]


def close(found, expected, tolerance):
    assert found.num_steps == expected.num_steps
    assert torch.allclose(found.alpha, expected.alpha, rtol=tolerance, atol=1e-12)
    assert torch.allclose(found.sigma, expected.sigma, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("expected", SCHEDULES)
def test_a_recognised_schedule_has_the_same_tables(expected):
    close(build(recognised(betas(expected))), expected, 1e-12)


@pytest.mark.parametrize("expected", SCHEDULES[:6])
def test_float32_suffices_to_recognise_a_name(expected):
    found = recognised(betas(expected).float())
    assert found["class_path"].endswith(type(expected).__name__)
    close(build(found), expected, 1e-12)


@pytest.mark.parametrize("expected", SCHEDULES)
def test_diffusers_builds_our_tables_from_an_export(expected):
    config = scheduler_config(process_of(expected))
    theirs = diffusers.DDIMScheduler.from_config(config)
    # their float32 products are that far off
    assert torch.allclose(theirs.alphas_cumprod.double(), expected.alpha.square(), rtol=1e-4, atol=1e-7)
    close(build(process(config, "x").schedule), expected, 1e-12)


def process_of(found):
    from ldm.interop.model import Process

    return Process(recognised(betas(found)), named(prediction.Velocity), sampler(DDIM(20)))


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_their_schedules_have_the_same_tables_here(name, rescale):
    theirs = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=rescale)
    found = build(process(dict(theirs.config), "x").schedule)
    assert torch.allclose(found.alpha.square(), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    assert (found.alpha[-1] == 0) == rescale


@pytest.mark.parametrize(
    ("name", "kind"),
    [("epsilon", "Epsilon"), ("v_prediction", "Velocity"), ("sample", "X0")],
)
def test_predictions_survive_export_and_import(name, kind):
    found = process({"prediction_type": name}, "x")
    assert found.prediction["class_path"] == f"ldm.diffusion.{kind}"
    assert scheduler_config(found)["prediction_type"] == name


def test_betas_given_one_by_one_are_the_schedule_that_they_are_of():
    expected = schedule.ScaledLinear()
    close(schedule.Betas(betas(expected).tolist()), expected, 1e-12)
    with pytest.raises(ValueError, match="every beta in"):
        schedule.Betas([0.1, 1.5])


def test_a_schedule_that_does_not_preserve_the_variance_has_no_betas():
    straight = schedule.ScaledLinear()
    straight.alpha = 1 - straight.sigma
    with pytest.raises(ValueError, match=r"model\.objective\.schedule is a ScaledLinear, expected one with"):
        betas(straight)


@pytest.mark.parametrize("spacing", [Trailing(), Leading(1), Leading(0), Linspace()])
def test_an_export_visits_our_timesteps(spacing):
    found = process_of(schedule.ScaledLinear())
    ours = DDIM(20, spacing=spacing)
    config = scheduler_config(Process(found.schedule, found.prediction, sampler(ours)))
    theirs = diffusers.DDIMScheduler.from_config(config)
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == [step.t for step in ours.steps(schedule.ScaledLinear())]
    assert process(config, "x").sampler["init_args"]["spacing"] == sampler(ours)["init_args"]["spacing"]


def test_timesteps_that_a_ddim_of_theirs_cannot_visit_become_trailing():
    assert sampler(DDIM(20, spacing=Karras())) == sampler(DDIM(20))


def test_published_schedulers_are_drawn_with_as_they_were():
    found = process({"_class_name": "PNDMScheduler", "steps_offset": 1}, "x").sampler
    assert found["class_path"] == "ldm.diffusion.samplers.PLMS"
    assert found["init_args"]["spacing"] == named(Leading, offset=1)
