"""Fits in ArviZ's terms, side by side: conversion, comparison, plots."""

from numpyro_sde.diagnostics.averaged import AveragedDrift, averaged_drift
from numpyro_sde.diagnostics.calibration import SBCResult, sbc
from numpyro_sde.diagnostics.compare import FitComparison, compare_fits
from numpyro_sde.diagnostics.compiled import compiled_chain
from numpyro_sde.diagnostics.convert import to_arviz
from numpyro_sde.diagnostics.filtered import FilteredEstimate, filtered_estimate
from numpyro_sde.diagnostics.fits import RefinedFit, SVIFit
from numpyro_sde.diagnostics.guides import GuideQuality, guide_quality
from numpyro_sde.diagnostics.plots import plot_fits, plot_paths
from numpyro_sde.diagnostics.refine import refine_fit
from numpyro_sde.diagnostics.scale import ScaleScan, sampling_scale_scan
from numpyro_sde.diagnostics.timing import Timing, timed

__all__ = [
    "AveragedDrift",
    "FilteredEstimate",
    "FitComparison",
    "GuideQuality",
    "RefinedFit",
    "SBCResult",
    "SVIFit",
    "ScaleScan",
    "Timing",
    "averaged_drift",
    "compare_fits",
    "compiled_chain",
    "filtered_estimate",
    "guide_quality",
    "plot_fits",
    "plot_paths",
    "refine_fit",
    "sampling_scale_scan",
    "sbc",
    "timed",
    "to_arviz",
]
