"""The law of a path's first state given data: normal in whitened coordinates of the guide's."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float
from numpyro.distributions import Distribution, biject_to

from numpyro_sde.distributions.moments import is_gaussian
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.guides.steps import Along, hold_value, log_normal
from numpyro_sde.linear.small import (
    cholesky,
    congruence,
    diagonal,
    matvec,
    psd_factor,
    solve_lower,
    transpose,
)
from numpyro_sde.statespace.model import StateSpaceModel

StartKind = Literal["fixed", "normal", "general"]


def start_kind(path: AbstractPathLaw) -> StartKind:
    """How a path begins."""
    if path.fixed_start is not None:
        return "fixed"
    return "normal" if is_gaussian(path.init) else "general"


def start_params(prefix: str, num_free: int, lead: tuple[int, ...]) -> dict[str, Array]:
    """Register shift and factor of the first state in the guide's whitened coordinates."""
    shift, factor = jnp.zeros((*lead, num_free)), jnp.zeros((*lead, num_free, num_free))
    return {
        "shift": numpyro.param(f"{prefix}_start_shift", shift, event_dim=1),
        "factor": numpyro.param(f"{prefix}_start_factor", factor, event_dim=2),
    }


class StartLaw:
    """The first state's law under a guide, for one path.

    A normal start is drawn from its law given the guide's observations. Any other is a normal in
    unconstrained coordinates, about the reference with the covariance of the start's first two
    moments given the observations.

    Args:
        kind: how the path begins.
        law: law of the first state, for its support.
        model: the state-space model.
        along: the guide.
        params: from `start_params`; None for a fixed start.
    """

    def __init__(
        self, kind: StartKind, law: Distribution, model: StateSpaceModel, along: Along, params: Any
    ) -> None:
        self.kind, self.law, self.model, self.along = kind, law, model, along
        self.params = params
        if kind == "fixed":
            return
        u = params["shift"].shape[-1]
        factor = params["factor"]
        self.factor = jnp.tril(factor, -1) + jnp.diag(jnp.exp(diagonal(factor)))
        self.log_det = jnp.sum(diagonal(factor))
        S = psd_factor(model.init_cov[:u, :u])
        H, reference = along.guide.H[0][:u, :u], along.guide.reference[0]
        L = cholesky(jnp.eye(u) + congruence(transpose(S), H))
        # Covariance S (I + S'H S)^-1 S' of the start given the observations, as T T'.
        self.T = transpose(solve_lower(L, transpose(S)))
        self.reference = reference[:u]
        if kind == "normal":
            pull = along.guide.e[0] - matvec(along.guide.H[0], model.init_mean - reference)
            half = solve_lower(L, matvec(transpose(S), pull[:u])[:, None])
            w = solve_lower(L, half, transposed=True)[:, 0]
            self.mean = model.init_mean[:u] + matvec(S, w)
            self.scale = S
            self.L = L
        else:
            bijector = biject_to(law.support)
            shape = () if _is_scalar(model) else (u,)
            self.bijector: Any = lambda y: jnp.ravel(bijector(jnp.reshape(y, shape)))
            self.inverse: Any = lambda x: jnp.ravel(bijector.inv(jnp.reshape(x, shape)))
            self.mean = self.inverse(self.reference)
            slope = diagonal(jax.jacfwd(self.inverse)(self.reference))
            self.T = psd_factor(jnp.outer(slope, slope) * (self.T @ transpose(self.T)))

    def held(self) -> StartLaw:
        """The same law, its parameters held."""
        params = jax.lax.stop_gradient(self.params)
        return StartLaw(self.kind, self.law, self.model, self.along, params)

    def draw(self, z: Float[Array, " u"]) -> tuple[Array, Array]:
        """First state `(d,)` of standard normals, and its log density; what is carried is zero."""
        if self.kind == "fixed":
            return self.model.init_mean, jnp.zeros((), self.model.init_mean.dtype)
        v = self.params["shift"] + matvec(self.factor, z)
        y = self.mean + self._spread(v)
        x = y if self.kind == "normal" else self.bijector(y)
        log_q = jnp.sum(log_normal(z)) - self.log_det - self._jacobian(y)
        return jnp.pad(x, (0, self.model.dim - x.size)), log_q

    def log_prob(self, x: Float[Array, " u"], normals: Array | None = None) -> Array:
        """Log density of a first state; `normals` are those behind it, if known."""
        if self.kind == "fixed":
            return jnp.zeros((), x.dtype)
        y = x if self.kind == "normal" else self.inverse(x)
        v = self._whitened(y - self.mean) - self.params["shift"]
        z = hold_value(solve_lower(self.factor, v[:, None])[:, 0], normals)
        return jnp.sum(log_normal(z)) - self.log_det - self._jacobian(y)

    def whitened(self, mean: Array, factor: Array) -> tuple[Array, Array]:
        """Mean and factor of a normal first state in the guide's whitened coordinates."""
        shift = self._whitened(mean - self.mean)
        return shift, jax.vmap(self._whitened, in_axes=1, out_axes=1)(factor)

    def _spread(self, v: Array) -> Array:
        if self.kind == "general":
            return matvec(self.T, v)
        return matvec(self.scale, solve_lower(self.L, v[:, None], transposed=True)[:, 0])

    def _whitened(self, y: Array) -> Array:
        if self.kind == "general":
            return solve_lower(self.T, y[:, None])[:, 0]
        return matvec(transpose(self.L), solve_lower(self.scale, y[:, None])[:, 0])

    def _jacobian(self, y: Array) -> Array:
        """Log Jacobian of the map from whitened coordinates to states."""
        if self.kind == "general":
            slopes = diagonal(jax.jacfwd(self.bijector)(y))
            return jnp.sum(jnp.log(diagonal(self.T))) + jnp.sum(jnp.log(jnp.abs(slopes)))
        return jnp.sum(jnp.log(diagonal(self.scale))) - jnp.sum(jnp.log(diagonal(self.L)))


def _is_scalar(model: StateSpaceModel) -> bool:
    return model.scalar if model.state_shape is None else model.state_shape == ()
