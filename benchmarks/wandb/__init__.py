"""What logging to W&B costs and survives: ``python -m benchmarks.wandb``."""
