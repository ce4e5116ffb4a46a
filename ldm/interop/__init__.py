"""Weights of other programs, both ways."""
