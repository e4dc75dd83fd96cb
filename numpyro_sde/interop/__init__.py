"""Bridges to optional packages, each imported in one file only."""
