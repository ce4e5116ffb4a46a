"""Does work survive being killed at any moment? ``python -m benchmarks.kills``."""
