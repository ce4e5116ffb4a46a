"""When and how checkpoints are written."""
