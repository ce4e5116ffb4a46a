"""What to sample, and how: requests, and guidance by a weaker model."""
