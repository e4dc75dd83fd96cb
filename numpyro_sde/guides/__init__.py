"""Variational guides: flows over the parameters of a model, structured laws over its paths."""

from numpyro_sde.guides.amortized import AmortizedGuide, panel_features
from numpyro_sde.guides.auto import AutoFlow
from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.conjugate import AutoConjugate
from numpyro_sde.guides.conjugate_fit import fit_conjugate
from numpyro_sde.guides.matched import MatchedPath
from numpyro_sde.guides.matched_bound import MatchedELBO
from numpyro_sde.guides.natural_fit import fit_natural
from numpyro_sde.guides.path_laws import ControlledPath, GaussianMarkovPath, PathLaw
from numpyro_sde.guides.path_posterior import PathGuideLaw
from numpyro_sde.guides.score import ConditionalScorePath
from numpyro_sde.guides.split import AutoSplit
from numpyro_sde.guides.training import fit_score, fit_svi

__all__ = [
    "AmortizedGuide",
    "AutoConjugate",
    "AutoFlow",
    "AutoPathGuide",
    "AutoSplit",
    "ConditionalScorePath",
    "ControlledPath",
    "GaussianMarkovPath",
    "MatchedELBO",
    "MatchedPath",
    "PathGuideLaw",
    "PathLaw",
    "fit_conjugate",
    "fit_natural",
    "fit_score",
    "fit_svi",
    "panel_features",
]
