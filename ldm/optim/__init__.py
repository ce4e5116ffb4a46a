"""Optimizers, their recipes and learning rates."""

from ldm.optim.recipes import AdamW, LinearScaling, Muon, NoScaling, Optimization, Scaling, SquareRootScaling

__all__ = ["AdamW", "LinearScaling", "Muon", "NoScaling", "Optimization", "Scaling", "SquareRootScaling"]
