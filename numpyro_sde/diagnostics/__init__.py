"""Fits in ArviZ's terms, side by side: conversion, comparison, plots."""

from numpyro_sde.diagnostics.compare import FitComparison, compare_fits
from numpyro_sde.diagnostics.convert import to_arviz
from numpyro_sde.diagnostics.draws import SVIFit
from numpyro_sde.diagnostics.guides import GuideQuality, guide_quality
from numpyro_sde.diagnostics.plots import plot_fits, plot_paths
from numpyro_sde.diagnostics.timing import Timing, timed

__all__ = [
    "FitComparison",
    "GuideQuality",
    "SVIFit",
    "Timing",
    "compare_fits",
    "guide_quality",
    "plot_fits",
    "plot_paths",
    "timed",
    "to_arviz",
]
