"""Where metrics and images are logged."""
