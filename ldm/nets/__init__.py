"""Networks: they know tensors, and nothing of data or training."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    autoencoder="KLAutoencoder",
    clip="CLIPModel",
    discriminator="Discriminator FeatureDiscriminator PatchGAN",
    dit="DiT",
    dit_blocks="DiTOptions",
    frozen="Frozen",
    routing="Routing Sprint",
    text="TextTower",
    unet="UNet",
)
