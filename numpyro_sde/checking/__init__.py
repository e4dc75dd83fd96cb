"""From data to a checked answer: fit, criticise, report, in one call or step by step."""

from numpyro_sde.checking.calibrated import posterior_sbc
from numpyro_sde.checking.fitting import CheckedFit, fit
from numpyro_sde.checking.predictive import predictive_check, residual_check
from numpyro_sde.checking.refits import power_scaling, sensitivity
from numpyro_sde.checking.report import CheckReport
from numpyro_sde.checking.run import check
from numpyro_sde.checking.steps import Step

__all__ = [
    "CheckReport",
    "CheckedFit",
    "Step",
    "check",
    "fit",
    "posterior_sbc",
    "power_scaling",
    "predictive_check",
    "residual_check",
    "sensitivity",
]
