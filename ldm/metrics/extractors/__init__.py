"""Networks whose features metrics compare."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    clip="CLIPExtractor Embedding OpenCLIP",
    dino="DINOv2",
    inception="Inception",
)
