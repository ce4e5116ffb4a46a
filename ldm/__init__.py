"""Train your own Stable Diffusion from scratch: autoencoder, CLIP and latent diffusion on tar shards."""

__version__ = "0.2.0"
