"""Remote shards against local ones."""
