"""One sampler per file: from noise and a function that estimates x0 to a sample; all of them can be named."""

from ldm.diffusion.samplers import ddim, ddpm, dpm_solver, euler, heun, plms, unipc

__all__ = ["ddim", "ddpm", "dpm_solver", "euler", "heun", "plms", "unipc"]
