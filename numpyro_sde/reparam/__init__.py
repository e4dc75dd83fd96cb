"""Reparametrisations of latent paths, as NumPyro `Reparam`s.

    numpyro.handlers.reparam(model, config={"x": GuidedReparam()})

`InnovationReparam` whitens a path under its prior, `GuidedReparam` under its posterior given the
observations, `BridgeReparam` between states that are known exactly; `auto` chooses.
"""

from numpyro_sde.reparam.automatic import auto
from numpyro_sde.reparam.guided import GuidedReparam
from numpyro_sde.reparam.path import BridgeReparam, InnovationReparam

__all__ = ["BridgeReparam", "GuidedReparam", "InnovationReparam", "auto"]
