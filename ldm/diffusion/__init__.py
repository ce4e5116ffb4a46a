"""The mathematics of diffusion in plain torch: it knows tensors and nothing of networks, data or training."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    guidance="ClassifierFree Guidance Interval Rescaled Unguided",
    objective="Objective",
    prediction="EDM Epsilon Flow Prediction Velocity X0",
    schedule="Betas Cosine Linear RectifiedFlow ScaledLinear Schedule ZeroTerminalSNR",
    timesteps="LogNormal LogitNormal LowDiscrepancy TimestepDistribution UniformTimesteps",
    variance_exploding="VarianceExploding",
    weighting="EDMWeighting MinSNR Simple SoftMinSNR Uniform VariationalBound Weighting",
)
