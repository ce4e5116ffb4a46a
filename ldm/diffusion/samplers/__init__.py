"""One sampler per file: from noise and a function that estimates x0 to a sample."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    ddim="DDIM",
    ddpm="DDPM",
    dpm_solver="DPMSolver DPMSolverSDE",
    euler="Euler EulerAncestral",
    heun="Heun",
    mean_flow="MeanFlowSampler",
    plms="PLMS",
    sampler="Sampler",
    spacing="Karras Leading Linspace Trailing",
    unipc="UniPC",
)
