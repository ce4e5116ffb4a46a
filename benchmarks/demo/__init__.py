"""From nothing to a text-to-image model: ``python -m benchmarks.demo``, what ``make demo`` runs."""
