"""Everything that is worth a measurement on one GPU."""
