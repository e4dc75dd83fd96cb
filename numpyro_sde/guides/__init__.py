"""Variational guides: flows over the parameters of a model, structured laws over its paths."""

from numpyro_sde.guides.auto import AutoFlow
from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.path_laws import ControlledPath, GaussianMarkovPath, PathLaw
from numpyro_sde.guides.path_posterior import PathGuideLaw
from numpyro_sde.guides.score import ConditionalScorePath
from numpyro_sde.guides.training import fit_score, fit_svi

__all__ = [
    "AutoFlow",
    "AutoPathGuide",
    "ConditionalScorePath",
    "ControlledPath",
    "GaussianMarkovPath",
    "PathGuideLaw",
    "PathLaw",
    "fit_score",
    "fit_svi",
]
