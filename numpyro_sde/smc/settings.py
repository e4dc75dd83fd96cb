"""How a particle filter runs: the proposals and resampling schemes by name, and their check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from numpyro_sde.smc.defensive import Auto, Defensive
from numpyro_sde.smc.guided_jumps import GuidedJumps, jumps_freely
from numpyro_sde.smc.next_observation import Auxiliary, ModifiedBridge, ResidualBridge
from numpyro_sde.smc.proposals import Bootstrap, Guided, Proposal
from numpyro_sde.smc.resampling import SCHEMES, Resampling
from numpyro_sde.statespace.checks import check_choice, check_count
from numpyro_sde.statespace.exact import has_exact
from numpyro_sde.statespace.guide import innovation_size, speaks_by_variance
from numpyro_sde.statespace.model import StateSpaceModel

# Share of the model's own steps where emissions make a guide's tails too light.
_SHARE = 0.1

PROPOSALS: dict[str, type[Proposal]] = {
    "auto": Auto,
    "guided": Guided,
    "bootstrap": Bootstrap,
    "auxiliary": Auxiliary,
    "defensive": Defensive,
    "modified_bridge": ModifiedBridge,
    "residual_bridge": ResidualBridge,
}
"""The proposals by name."""


class Setting(NamedTuple):
    """How a particle filter runs.

    Attributes:
        num_particles: number M of particles.
        proposal: how they move.
        resampler: a `Resampling`, or one of `smc.resampling`'s functions.
        ess_threshold: share of M below which the effective size calls for resampling; 1 or more
            resamples at every observation.
    """

    num_particles: int
    proposal: Proposal
    resampler: Callable[..., Array]
    ess_threshold: float

    def for_model(self, model: StateSpaceModel) -> Setting:
        """The same setting, the proposal chosen by the model where it is one that chooses."""
        if type(self.proposal) is Guided and jumps_freely(model):
            return self._replace(proposal=GuidedJumps())
        return self._replace(proposal=self.proposal.chosen(model))


def make_setting(
    num_particles: int,
    proposal: str | Proposal,
    resampling: str | Resampling,
    ess_threshold: float,
    *,
    least: int = 1,
    retraced: bool = False,
) -> Setting:
    """Check the options of a particle filter and gather them.

    Args:
        num_particles: number of particles.
        proposal: a proposal or the name of one.
        resampling: a resampling scheme or the name of one.
        ess_threshold: share of particles below which the effective size calls for resampling.
        least: least number of particles.
        retraced: whether the proposal must be able to weigh a path that it did not draw, as
            conditional filters ask.

    Raises:
        ValueError: an option out of range, or a proposal that cannot be retraced.
        TypeError: a count that is no integer; neither a name nor an object of the right class.
    """
    check_count("num_particles", num_particles, least)
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold must be between 0 and 1, got {ess_threshold}")
    known = {n: p for n, p in PROPOSALS.items() if p().retraced or not retraced}
    chosen = _by_name("proposal", proposal, known, Proposal)
    if retraced and not chosen.retraced:
        raise ValueError(
            f"{chosen!r} cannot weigh a path that it did not draw, which conditional filters need: "
            f"take one of {', '.join(known)}, or define its `ratio`"
        )
    scheme = _by_name("resampling", resampling, SCHEMES, Resampling)
    return Setting(num_particles, chosen, scheme, float(ess_threshold))


def name_of(value: Any, known: dict[str, Any]) -> Any:
    """The name of a proposal or scheme that has one and no options set, else itself."""
    for name, found in known.items():
        plain = isinstance(found, type) and type(value) is found and repr(value) == repr(found())
        if value is found or plain:
            return name
    return value


def _by_name(name: str, value: Any, known: dict[str, Any], kind: type) -> Any:
    if isinstance(value, kind) or any(value is found for found in known.values()):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {', '.join(map(repr, known))} or an object of class "
            f"{kind.__name__}, got {value!r}"
        )
    check_choice(name, value, tuple(known))
    found = known[value]
    return found() if isinstance(found, type) else found


def with_own_steps(setting: Setting, model: StateSpaceModel, share: float | None) -> Setting:
    """The setting for conditional filters of a model: its guided proposal made defensive.

    Args:
        setting: the filter's setting.
        model: the path and its instruments.
        share: probability of the model's own steps; None for what "auto" takes, and for "guided"
            0.1 where an emission is not normal or its variance depends on the state, else 0.
    """
    automatic = isinstance(setting.proposal, Auto)
    if jumps_freely(model):
        return setting.for_model(model)
    if automatic and innovation_size(model) > model.dim:  # steps that cannot be retraced
        return setting._replace(proposal=Bootstrap())
    if not automatic and type(setting.proposal) is not Guided:
        return setting
    if share is None and automatic:
        return setting.for_model(model)
    if share is None and has_exact(model):
        return setting
    if share is None:
        normal = all(i.gaussian and not speaks_by_variance(model, i) for i in model.instruments)
        share = 0.0 if normal else _SHARE
    return setting._replace(proposal=Defensive(share=share) if share else Guided())
