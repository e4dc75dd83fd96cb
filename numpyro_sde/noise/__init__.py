"""Driving noises of an SDE: Brownian motion, and fractional Brownian motion made Markov."""

from numpyro_sde.noise.brownian import AbstractNoise, Brownian
from numpyro_sde.noise.markov_fbm import MarkovFBM

__all__ = ["AbstractNoise", "Brownian", "MarkovFBM"]
