"""Sampling requests and their output, and guidance by a weaker model."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    autoguidance="Autoguidance",
)
