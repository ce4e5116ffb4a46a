"""What shards hold and what of it is broken, for ``ldm.inspect``."""
