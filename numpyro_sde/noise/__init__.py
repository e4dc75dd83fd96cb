"""Driving noises of an SDE."""

from numpyro_sde.noise.brownian import AbstractNoise, Brownian

__all__ = ["AbstractNoise", "Brownian"]
