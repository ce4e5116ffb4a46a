"""Prove that a change of the code changed no number: ``python -m benchmarks.same BEFORE AFTER``."""
