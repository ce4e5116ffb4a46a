"""One sampler per file: from noise and a function that estimates x0 to a sample."""
