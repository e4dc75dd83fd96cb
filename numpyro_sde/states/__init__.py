"""States given parameters: filtered and smoothed."""
