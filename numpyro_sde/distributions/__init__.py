"""NumPyro distributions: path laws and observation laws."""
