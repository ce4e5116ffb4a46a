"""Networks: they know tensors, and nothing of data or training."""
