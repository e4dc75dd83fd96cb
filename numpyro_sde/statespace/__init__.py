"""A path and its data as the state-space model that filters, particles and guides take."""
