"""Measures of generated images: float64 sums, no Lightning."""
