"""Commands that measure, each prints one table: ``python -m benchmarks.NAME``."""
