"""The mathematics of diffusion in plain torch: it knows tensors and nothing of networks, data or training."""
