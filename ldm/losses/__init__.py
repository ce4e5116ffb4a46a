"""One loss term per file."""

from ldm import exports

__getattr__, __all__ = exports(__name__, kl="KL", reconstruction="Reconstruction", term="LossTerm")
