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

from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.information import guided_innovations, log_weight, whiten_innovations
from numpyro_sde.linear.small import matvec, psd_factor
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.smc.guided_jumps import GuidedJumps, can_be_guided
from numpyro_sde.smc.proposals import (
    Bootstrap,
    Guided,
    Plan,
    Proposal,
    mixed_level,
    move_by,
    observed_rows,
)
from numpyro_sde.statespace.exact import has_exact, refuse_exact
from numpyro_sde.statespace.guide import affine_step, first_inputs, speaks_by_variance
from numpyro_sde.statespace.model import StateSpaceModel

# Share of the model's own steps where none is given, and those that "auto" races.
_PLAIN_SHARE = 0.25
SHARES = (0.0, _PLAIN_SHARE, 1.0)


class Defensive(Guided):
    """Guided steps, mixed with the model's own from each observation to the next.

    Attributes:
        share: probability of the model's own steps; with 0 this is `Guided`, with 1 `Bootstrap`.

    Example:
        >>> Defensive(share=0.1)
        Defensive(share=0.1)
    """

    share: Any = eqx.field(kw_only=True, default=_PLAIN_SHARE)

    @property
    def num_extra(self) -> int:
        return 1

    def plan(self, model: StateSpaceModel) -> Plan:
        refuse_exact(model, "own_share, with which particles move as the model does")
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
        now, _, _, begins = step
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
        return mixed_level(ahead, log_weights, self._log_share, self._log_rest)

    def _is_own(self, z: Array) -> Array:
        return z[-1] < self.share

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
        # Where all steps are the model's own, whatever the guide says.
        log_guided = jnp.where(jnp.isfinite(self._log_rest), log_guided, 0.0)
        return -jnp.logaddexp(self._log_share, self._log_rest + log_guided)

    @property
    def _log_share(self) -> Any:
        return jnp.log(jnp.asarray(self.share, jnp.result_type(float)))

    @property
    def _log_rest(self) -> Any:
        return jnp.log1p(-jnp.asarray(self.share, jnp.result_type(float)))


class Auto(Proposal):
    """The proposal that a model and its data ask for: `proposal="auto"`.

    Where transitions and emissions are linear and normal it is `Guided`, which is exact there, and
    where a component is seen exactly, which only guided particles meet;
    of a jump-diffusion with normal sizes and normal emissions guided jumps; elsewhere, where steps
    are no smooth maps of their innovations, `Bootstrap`. Else
    guided particles, the model's own steps and a mixture of both are raced on short filters with
    random numbers of their own, and the one with the highest mean log likelihood runs
    (`smc.race`). The rule sees form, parameters, data and key alone: the same key gives the same
    result, inside and outside of `jax.jit`.

    Example:
        >>> Auto()
        Auto()
    """

    @property
    def retraced(self) -> bool:
        return True

    def chosen(self, model: StateSpaceModel) -> Proposal:
        if can_be_guided(model) and all(
            i.gaussian and not speaks_by_variance(model, i) for i in model.instruments
        ):
            return GuidedJumps()
        if not model.scheme.smooth:
            return Bootstrap()
        return Guided() if has_exact(model) or is_linear_gaussian(model) else Defensive()

    def move(self, *args: Any) -> Any:
        del args
        raise TypeError("Auto() stands for another proposal: ask for chosen(model)")


def is_linear_gaussian(model: StateSpaceModel) -> bool:
    """Whether steps and emissions are normal with affine means, found by tracing them."""
    if not isinstance(model.scheme, GaussianScheme) or not all(
        i.gaussian for i in model.instruments
    ):
        return False
    step = [0]
    if model.num_times > 1:
        t, dt, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
        step = degrees(lambda x: affine_step(model, t, dt, x, cache), model.init_mean)
    emissions = [
        degrees(partial(i.moments, first_inputs(i)), model.init_mean) for i in model.instruments
    ]
    return all(mean <= 1 and all(d == 0 for d in rest) for mean, *rest in (step, *emissions))
