"""The mathematics of diffusion in plain torch: it knows tensors and nothing of networks, data or training."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    contrastive_flow="ContrastiveFlow",
    directed_flow="DirectedFlow",
    guidance="ClassifierFree Guidance Interval NegativePrompt Rescaled Unguided",
    learned_variance="LearnedVariance",
    mean_flow="MeanFlow",
    objective="Objective",
    prediction="EDM Epsilon Flow Prediction Velocity X0",
    resolution_flow="ResolutionFlow",
    schedule="Betas Cosine Linear RectifiedFlow ScaledLinear Schedule ZeroTerminalSNR",
    timesteps="LogNormal LogitNormal LowDiscrepancy TimestepDistribution UniformTimesteps",
    variance_exploding="VarianceExploding",
    weighting="EDMWeighting FlowError MinSNR Simple SoftMinSNR Uniform VariationalBound Weighting",
)
