"""Import and export of weights of other programs."""
