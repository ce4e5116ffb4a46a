"""The space that diffusion works in, and shards of it."""
