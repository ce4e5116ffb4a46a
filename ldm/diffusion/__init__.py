"""The mathematics of diffusion in plain torch: it knows tensors and nothing of networks, data or training."""

from ldm.diffusion.guidance import ClassifierFree, Guidance, Interval, Rescaled, Unguided
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import EDM, X0, Epsilon, Flow, Prediction, Velocity
from ldm.diffusion.schedule import (
    Betas,
    Cosine,
    Linear,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    ZeroTerminalSNR,
)
from ldm.diffusion.timesteps import (
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    TimestepDistribution,
    UniformTimesteps,
)
from ldm.diffusion.variance_exploding import VarianceExploding
from ldm.diffusion.weighting import (
    EDMWeighting,
    MinSNR,
    Simple,
    SoftMinSNR,
    Uniform,
    VariationalBound,
    Weighting,
)

__all__ = [
    "EDM",
    "X0",
    "Betas",
    "ClassifierFree",
    "Cosine",
    "EDMWeighting",
    "Epsilon",
    "Flow",
    "Guidance",
    "Interval",
    "Linear",
    "LogNormal",
    "LogitNormal",
    "LowDiscrepancy",
    "MinSNR",
    "Objective",
    "Prediction",
    "RectifiedFlow",
    "Rescaled",
    "ScaledLinear",
    "Schedule",
    "Simple",
    "SoftMinSNR",
    "TimestepDistribution",
    "Unguided",
    "Uniform",
    "UniformTimesteps",
    "VarianceExploding",
    "VariationalBound",
    "Velocity",
    "Weighting",
    "ZeroTerminalSNR",
]
