"""Fits in ArviZ's terms, side by side."""
