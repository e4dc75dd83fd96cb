"""Guided particles of which some move as the model does, so that no weight is huge.

A guide made of normal laws has light tails. Where an observation tells of a state through its
variance, as a return tells of a volatility, the law of the path has heavier ones: a path far out is
proposed too seldom, weighs too much when it is, and conditional sequential Monte Carlo keeps it for
thousands of sweeps. Here a particle moves from one observation to the next by the model's own steps
with some probability, else guided, and is weighed by the mixture of the two laws of its whole way:
no ratio exceeds the inverse of that probability (Hesterberg 1995). The look-ahead function is
mixed with a constant in the same proportion, since weights are divided by it after resampling.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.special import ndtri

from numpyro_sde.linear.information import guided_innovations, log_weight, whiten_innovations
from numpyro_sde.linear.small import matvec, psd_factor
from numpyro_sde.smc.particle_filter import Setting
from numpyro_sde.smc.proposals import Guided, Plan, move_by, observed_rows
from numpyro_sde.statespace.guide import affine_step, speaks_by_variance
from numpyro_sde.statespace.model import StateSpaceModel

# Share of the model's own steps where emissions make a guide's tails too light.
_SHARE = 0.1


class Defensive(Guided):
    """Guided steps, mixed with the model's own from each observation to the next.

    Attributes:
        share: probability of the model's own steps, in (0, 1).

    Example:
        >>> Defensive(share=0.1)
        Defensive(share=0.1)
    """

    share: float = eqx.field(static=True, kw_only=True)

    @property
    def num_extra(self) -> int:
        return 1

    def plan(self, model: StateSpaceModel) -> Plan:
        plan = super().plan(model)
        begins = np.isin(np.arange(model.num_times - 1), observed_rows(model))
        begins[:1] = True
        return plan._replace(steps=(*plan.steps, jnp.asarray(begins)))

    def start(
        self, model: StateSpaceModel, plan: Plan, z: Float[Array, " d+1"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        assert plan.guide is not None
        S = psd_factor(model.init_cov)
        guide, ahead = plan.guide, model.init_mean - plan.guide.reference[0]
        w, ratio = self._draw(guide.H[0], guide.e[0], ahead, S, z[:-1], self._is_own(z))
        return model.init_mean + matvec(S, w), self._mixed(-ratio)

    def enter(self, model: StateSpaceModel, node: Any, x: Float[Array, " d"]) -> Any:
        del model, node
        return jnp.zeros((), x.dtype), jnp.zeros((), bool)

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        now, _, begins = step
        t, dt, cache = now
        before, own = memo
        before = jnp.where(begins, 0.0, before)
        own = jnp.where(begins, self._is_own(z), own)
        mean, B = affine_step(model, t, dt, x, cache)
        H, e, base = self.information(step, B)
        w, ratio = self._draw(H, e, mean - base, B, z[:-1], own)
        new = move_by(model, now, x, (mean, B), w)
        after = before - ratio
        return new, (after, own), self._mixed(after) - self._mixed(before)

    def ratio(self, model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
        return self._mixed(-super().ratio(model, step, x, following))

    def start_ratio(self, model: StateSpaceModel, plan: Plan, x: Array) -> Array:
        return self._mixed(-super().start_ratio(model, plan, x))

    def path_ratios(self, model: StateSpaceModel, plan: Plan, path: Array) -> Array:
        one = partial(super().ratio, model)
        ratios = jax.vmap(one)(plan.steps, path[:-1], path[1:])

        def add(before: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
            ratio, begins = now
            before = jnp.where(begins, 0.0, before)
            after = before - ratio
            return after, self._mixed(after) - self._mixed(before)

        return lax.scan(add, jnp.zeros((), path.dtype), (ratios, plan.steps[-1]))[1]

    def level(
        self, ahead: Float[Array, " M"], log_weights: Float[Array, " M"]
    ) -> Float[Array, " M"]:
        usable = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
        mean = jax.nn.logsumexp(ahead + usable) - jax.nn.logsumexp(usable)
        mean = jnp.where(jnp.isfinite(mean), mean, 0.0)
        return jnp.logaddexp(np.log1p(-self.share) + ahead, np.log(self.share) + mean)

    def _is_own(self, z: Array) -> Array:
        return z[-1] < float(ndtri(self.share))

    def _draw(
        self, H: Array, e: Array, ahead: Array, B: Array, z: Array, own: Array
    ) -> tuple[Array, Array]:
        """Innovations, and the log of their density over that of guided ones."""
        guided, _ = guided_innovations(H, e, ahead, B, z)
        w = jnp.where(own, z, guided)
        white, log_det = whiten_innovations(H, e, ahead, B, w)
        return w, log_weight(w, white, log_det)

    def _mixed(self, log_guided: Array) -> Array:
        """Log density of the model's steps over the mixture, from guided ones' over the model's."""
        return -jnp.logaddexp(np.log(self.share), np.log1p(-self.share) + log_guided)


def with_own_steps(setting: Setting, model: StateSpaceModel, share: float | None) -> Setting:
    """The setting for conditional filters of a model: its guided proposal made defensive.

    Args:
        setting: the filter's setting.
        model: the path and its instruments.
        share: probability of the model's own steps; None for 0.1 where an emission is not normal or
            its variance depends on the state, else 0.
    """
    if not isinstance(setting.proposal, Guided):
        return setting
    if share is None:
        normal = all(i.gaussian and not speaks_by_variance(model, i) for i in model.instruments)
        share = 0.0 if normal else _SHARE
    return setting._replace(proposal=Defensive(share=share)) if share else setting
