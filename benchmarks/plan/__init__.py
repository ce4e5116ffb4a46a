"""What a configuration needs on GPUs, without any: memory of a step, and what processes send each other."""
