"""What a NumPyro model says of its paths, read once for all engines."""
