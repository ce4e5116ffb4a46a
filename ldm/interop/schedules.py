"""Noise schedules, predictions and samplers by our names and by diffusers'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ldm import class_path
from ldm.diffusion import prediction, schedule
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Leading, Linspace, Spacing, Trailing
from ldm.diffusion.schedule import Schedule
from ldm.interop.model import Process, arguments
from ldm.io.checkpoint import instantiate

PREDICTIONS = {
    "epsilon": prediction.Epsilon,
    "v_prediction": prediction.Velocity,
    "sample": prediction.X0,
}
"""Our class of each ``prediction_type``."""
SCHEDULES: dict[str, type[Schedule]] = {
    "scaled_linear": schedule.ScaledLinear,
    "linear": schedule.Linear,
    "squaredcos_cap_v2": schedule.Cosine,
}
"""Our class of each ``beta_schedule``."""
SPACINGS: dict[str, type[Spacing]] = {"trailing": Trailing, "leading": Leading, "linspace": Linspace}
"""Our class of each ``timestep_spacing``."""
DEFAULTS: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
"""Defaults of diffusers for a scheduler_config.json."""
EXACT = 1e-6
"""Relative difference below which betas are equal: twice the resolution of float32."""


def named(kind: type, **arguments: Any) -> dict[str, Any]:
    """Name an object as configurations do."""
    return {"class_path": class_path(kind), "init_args": arguments}


def sampler(found: Sampler) -> dict[str, Any]:
    """Name a DDIM of as many steps as ``found``, at the same timesteps where diffusers' DDIM can be there."""
    kind = type(found.spacing) if type(found.spacing) in SPACINGS.values() else Trailing
    offset = {"offset": found.spacing.offset} if isinstance(found.spacing, Leading) else {}
    return named(DDIM, num_steps=found.num_steps or 50, spacing=named(kind, **offset))


def process(config: Mapping[str, Any], name: str) -> Process:
    """Read a scheduler_config.json.

    A PNDM becomes PLMS, anything else DDIM, with the file's timesteps and 50 steps, the run's default.
    Ours end at clean, theirs may end at the first timestep's level.

    Args:
        config: Its contents.
        name: The file, for messages.

    Raises:
        ValueError: If the schedule or the prediction is of a kind that we have not.
    """
    config = DEFAULTS | dict(config)
    if config["prediction_type"] not in PREDICTIONS or config["use_flow_sigmas"]:
        found = "flow" if config["use_flow_sigmas"] else config["prediction_type"]
        raise ValueError(f"{name}: prediction_type is {found}, expected {' or '.join(PREDICTIONS)}")
    kind = PLMS if config["_class_name"] == "PNDMScheduler" else DDIM
    spacing = SPACINGS.get(config["timestep_spacing"], Trailing)
    offset = {"offset": config["steps_offset"]} if spacing is Leading else {}
    sampler = named(kind, num_steps=50, spacing=named(spacing, **offset))
    return Process(_schedule(config, name), named(PREDICTIONS[config["prediction_type"]]), sampler)


def check_process(found: Process, name: str) -> Process:
    """Check that the noise is not predicted where the last timestep is nothing else.

    Args:
        found: A process.
        name: What messages call it: its file.

    Raises:
        ValueError: If it is.
    """
    is_epsilon = found.prediction["class_path"] == class_path(prediction.Epsilon)
    if is_epsilon and found.schedule["class_path"] == class_path(schedule.ZeroTerminalSNR):
        raise ValueError(
            f"{name}: prediction_type is epsilon with zero terminal SNR, expected v_prediction or sample: "
            "the last timestep is pure noise, without information about the image"
        )
    return found


def scheduler_config(process: Process) -> dict[str, Any]:
    """Write the scheduler_config.json of a DDIM that visits the timesteps that ours does, clean at last.

    Args:
        process: With a schedule that ``recognised`` named, and a sampler that ``sampler`` did.
    """
    spacing = process.sampler["init_args"]["spacing"]
    spacings = {class_path(kind): name for name, kind in SPACINGS.items()}
    kinds = {class_path(kind): name for name, kind in PREDICTIONS.items()}
    return {
        "_class_name": "DDIMScheduler",
        **_betas(process.schedule),
        "prediction_type": kinds[process.prediction["class_path"]],
        "clip_sample": False,
        "set_alpha_to_one": True,
        # without Leading it does not matter, but their pipelines complain of another than 1
        "steps_offset": spacing["init_args"].get("offset", 1),
        "timestep_spacing": spacings[spacing["class_path"]],
        "thresholding": False,
    }


def betas(found: Schedule) -> Tensor:
    """Return beta_t = 1 - abar_t / abar_{t - 1} of a variance-preserving schedule, (T,) float64.

    Raises:
        ValueError: If the schedule does not preserve the variance: it has no betas.
    """
    abar = found.alpha.square()
    if (abar + found.sigma.square() - 1).abs().max() > EXACT:
        raise ValueError(
            f"model.objective.schedule is a {type(found).__name__}, expected one with alpha^2 + sigma^2 = 1: "
            "Stable Diffusion's formats know no other"
        )
    return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])


def recognised(beta: Tensor | Sequence[float]) -> dict[str, Any]:
    """Find the schedule that has these betas, of those with a name; else list them.

    Args:
        beta: (T,), in float32's precision or better.

    Returns:
        ``{"class_path", "init_args"}`` of a ``Schedule``.
    """
    beta = torch.as_tensor(beta, dtype=torch.float64)
    for config, built in _known_schedules(beta):
        if torch.allclose(betas(built), beta, rtol=EXACT, atol=0):
            return config
    return named(schedule.Betas, values=beta.tolist())


def build(config: Mapping[str, Any]) -> Schedule:
    """Build a schedule that ``recognised`` or ``process`` named."""
    return instantiate(config, Schedule)[0]


def _known_schedules(beta: Tensor) -> Iterator[tuple[dict[str, Any], Schedule]]:
    """Build the schedules with a name that begin and end as ``beta`` does."""
    first, last = (float(f"{end:.6g}") for end in (beta[0].item(), beta[-1].item()))
    for name, kind in SCHEDULES.items():
        with suppress(ValueError):  # of a kind that such ends leave nothing of x0 long before the last
            if last < 1:
                given = _arguments(name, len(beta), first, last)
                yield named(kind, **given), kind(**given)
            else:  # which end was moved to 1 cannot be seen any more, so the usual ones
                usual = arguments(kind, {})
                given = _arguments(name, len(beta), usual.get("beta_start", 0), usual.get("beta_end", 0))
                moved = schedule.ZeroTerminalSNR(kind(**given))
                yield named(schedule.ZeroTerminalSNR, schedule=named(kind, **given)), moved


def _arguments(name: str, num_steps: int, first: float, last: float) -> dict[str, Any]:
    ends = {} if name == "squaredcos_cap_v2" else {"beta_start": first, "beta_end": last}
    return {"num_steps": num_steps, **ends}


def _schedule(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Name what the file describes; listed betas may be those of a known schedule."""
    kind, rescales = config["beta_schedule"], config["rescale_betas_zero_snr"]
    if config["trained_betas"] is not None:
        found = recognised(config["trained_betas"])
    elif kind in SCHEDULES:
        count, first, last = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
        found = named(SCHEDULES[kind], **_arguments(kind, count, first, last))
    else:
        raise ValueError(
            f"{name}: beta_schedule is {kind}, expected {' or '.join(SCHEDULES)}, or trained_betas"
        )
    done = found["class_path"] == class_path(schedule.ZeroTerminalSNR)
    return named(schedule.ZeroTerminalSNR, schedule=found) if rescales and not done else found


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a schedule as a scheduler_config.json."""
    arguments = dict(config["init_args"])
    if config["class_path"] == class_path(schedule.ZeroTerminalSNR):
        return {**_betas(arguments["schedule"]), "rescale_betas_zero_snr": True}
    for name, kind in SCHEDULES.items():
        if class_path(kind) == config["class_path"]:
            return {"num_train_timesteps": arguments.pop("num_steps"), "beta_schedule": name, **arguments}
    return {"num_train_timesteps": len(arguments["values"]), "trained_betas": arguments["values"]}
