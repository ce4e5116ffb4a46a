"""Measures of generated pictures: float64 sums, no Lightning."""
