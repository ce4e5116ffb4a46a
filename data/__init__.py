"""Packers: they turn pictures and captions into tar shards. Run them from the repository root."""
