"""How start, memory and step grow with samples, shards, parameters and the length of a run."""
