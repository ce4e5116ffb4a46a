"""Packers: they turn images and captions into tar shards. Run them from the repository root."""
