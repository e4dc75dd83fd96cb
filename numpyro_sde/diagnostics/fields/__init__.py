"""What a fit says of an unknown function: bands, rest points, invariant density, plots."""
