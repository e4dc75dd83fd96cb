"""Fits in ArviZ's terms, side by side: conversion, comparison, plots."""

from numpyro_sde.diagnostics.calibration.compiled import compiled_chain
from numpyro_sde.diagnostics.calibration.sbc import SBCResult, sbc
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.fits import RefinedFit, SVIFit
from numpyro_sde.diagnostics.compare.fits_compared import FitComparison, compare_fits
from numpyro_sde.diagnostics.compare.guide_quality import GuideQuality, guide_quality
from numpyro_sde.diagnostics.compare.plots import plot_fits, plot_paths
from numpyro_sde.diagnostics.compare.refine import refine_fit
from numpyro_sde.diagnostics.compare.timing import Timing, timed
from numpyro_sde.diagnostics.fields.band import field_band
from numpyro_sde.diagnostics.fields.field_plots import plot_field
from numpyro_sde.diagnostics.fields.stationary import RestPoints, invariant_density, rest_points
from numpyro_sde.diagnostics.prediction.forecast import Forecast
from numpyro_sde.diagnostics.prediction.leave_future import LeaveFutureOut, lfo
from numpyro_sde.diagnostics.prediction.models_compared import ModelComparison, compare_models
from numpyro_sde.diagnostics.prediction.one_step import Predictions, k_step
from numpyro_sde.diagnostics.prediction.residuals import Residuals, residuals
from numpyro_sde.diagnostics.prediction.rules import crps, energy_score
from numpyro_sde.diagnostics.prediction.scores import Scores, score
from numpyro_sde.diagnostics.scales.averaged import AveragedDrift, averaged_drift
from numpyro_sde.diagnostics.scales.filtered import FilteredEstimate, filtered_estimate
from numpyro_sde.diagnostics.scales.scan import ScaleScan, sampling_scale_scan

__all__ = [
    "AveragedDrift",
    "FilteredEstimate",
    "FitComparison",
    "Forecast",
    "GuideQuality",
    "LeaveFutureOut",
    "ModelComparison",
    "Predictions",
    "RefinedFit",
    "Residuals",
    "RestPoints",
    "SBCResult",
    "SVIFit",
    "ScaleScan",
    "Scores",
    "Timing",
    "averaged_drift",
    "compare_fits",
    "compare_models",
    "compiled_chain",
    "crps",
    "energy_score",
    "field_band",
    "filtered_estimate",
    "guide_quality",
    "invariant_density",
    "k_step",
    "lfo",
    "plot_field",
    "plot_fits",
    "plot_paths",
    "refine_fit",
    "residuals",
    "rest_points",
    "sampling_scale_scan",
    "sbc",
    "score",
    "timed",
    "to_arviz",
]
