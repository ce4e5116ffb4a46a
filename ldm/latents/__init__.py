"""The space that diffusion works in, and shards of it."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    space="AutoencoderLatents LatentSpace Pixels",
)
