"""The three stages of training, the only LightningModules."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    autoencoder="Autoencoder",
    clip="CLIP",
    diffusion="Diffusion",
    load="CLIPTower load_stage",
    stage="Stage",
)
