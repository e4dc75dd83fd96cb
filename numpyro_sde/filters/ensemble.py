"""The ensemble Kalman filter with perturbed observations.

Source: Evensen (1994), "Sequential data assimilation with a nonlinear quasi-geostrophic
model"; Burgers, van Leeuwen and Evensen (1998), "Analysis scheme in the ensemble Kalman
filter".
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    matvec,
    psd_factor,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.statespace.checks import (
    EMISSIONS,
    check_brownian,
    check_choice,
    check_count,
    check_moments,
)
from numpyro_sde.statespace.exact import refuse_exact
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, Instrument, StateSpaceModel
from numpyro_sde.statespace.updates import LOG_2PI, laplace, with_valid_inputs

_Ensemble = Float[Array, "M d"]


class EnsembleKalman(AbstractFilter):
    """Stochastic ensemble Kalman filter, a deterministic function of the parameters.

    Members are moved by the scheme's own steps (any scheme with innovations, Gaussian or not)
    and corrected by the gain that the ensemble's moments give. It is an approximation twice
    over: the correction is right for Gaussian laws only, and the moments carry sampling error
    of order `1 / sqrt(num_members)`. All random numbers come from `seed`, the same for every
    parameter value, so the log likelihood is a smooth function that NUTS and SVI may
    differentiate; its error is then a fixed perturbation of the target, not noise. Compare two
    seeds before trusting a posterior. There is no localisation: the members must
    outnumber the states several times.

    Args:
        num_members: size of the ensemble.
        seed: seed of all random numbers.
        inflation: factor on the members' deviations from their mean after each step; 1 for
            none.
        emission: for emissions that are not Gaussian, "laplace" (Laplace approximation on the
            ensemble's Gaussian, members moved to match it) or "moments" (conditional mean and
            covariance).
        newton_steps: damped Newton steps of the Laplace approximation.

    Raises:
        ValueError: an option out of range. When used: a scheme without innovations, or fewer
            members than states plus two.
        TypeError: a count that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.EnsembleKalman(num_members=200).num_members
        200
    """

    num_members: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    inflation: float = eqx.field(static=True)
    emission: str = eqx.field(static=True)
    newton_steps: int = eqx.field(static=True)

    def __init__(
        self,
        num_members: int = 100,
        *,
        seed: int = 0,
        inflation: float = 1.0,
        emission: str = "laplace",
        newton_steps: int = 10,
    ) -> None:
        check_count("num_members", num_members, least=3)
        check_count("seed", seed, least=0)
        check_choice("emission", emission, EMISSIONS)
        check_count("newton_steps", newton_steps)
        if not inflation > 0:
            raise ValueError(f"inflation must be positive, got {inflation}")
        self.num_members = num_members
        self.seed = seed
        self.inflation = float(inflation)
        self.emission = emission
        self.newton_steps = newton_steps

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "EnsembleKalman()")
        check_moments(model, "EnsembleKalman()", self.emission)
        refuse_exact(model, "EnsembleKalman()")
        if not model.scheme.has_innovations:
            raise ValueError(
                f"EnsembleKalman() moves members by the scheme's innovations, which "
                f"{type(model.scheme).__name__} has not: "
                f"{model.scheme.remedy('use Euler(), Milstein() or Exact()')}"
            )
        model.scheme.require_smooth("EnsembleKalman()")
        if self.num_members < model.dim + 2:
            raise ValueError(
                f"num_members must be at least d + 2 = {model.dim + 2} for {model.dim} states "
                f"(the ensemble's covariance is singular below), got {self.num_members}"
            )

    def filter(self, model: StateSpaceModel) -> FilterResult:
        return self.filter_with_key(model, jax.random.key(self.seed))

    def filter_with_key(self, model: StateSpaceModel, key: PRNGKeyArray) -> FilterResult:
        """Run the filter on the random numbers of `key` instead of those of `seed`.

        Map it over keys to see the error that the size of the ensemble leaves.
        """
        self.check(model)
        model = with_valid_inputs(model)
        first_key, key = jax.random.split(key)

        def step(members: _Ensemble, inputs: Any) -> tuple[_Ensemble, Any]:
            k, now, data = inputs
            move_key, update_key = jax.random.split(jax.random.fold_in(key, k))
            forecast = self._inflate(self._move(model, move_key, members, now))
            cross = _covariance(members, forecast)
            updated, log_density = self._observe(model, update_key, forecast, data)
            return updated, (updated, _moments(updated), _moments(forecast), cross, log_density)

        data = model.observation_inputs()
        start_key, update_key = jax.random.split(first_key)
        start = _draw_start(model, start_key, self.num_members)
        first, first_density = self._observe(
            model, update_key, start, jax.tree.map(lambda a: a[0], data)
        )
        rest = jax.tree.map(lambda a: jnp.asarray(a)[1:], data)
        inputs = (jnp.arange(model.num_times - 1), model.step_inputs(), rest)
        _, (members, filtered, predicted, cross, increments) = lax.scan(
            jax.checkpoint(step), first, inputs
        )

        def join(a: Array, b: Array) -> Array:
            return jnp.concatenate([a[None], b])

        mean, cov = jax.tree.map(join, _moments(first), filtered)
        predicted_mean, predicted_cov = jax.tree.map(join, _moments(start), predicted)
        increments = join(first_density, increments)
        particles = join(first, members)
        return FilterResult(
            times=model.times,
            log_likelihood=jnp.sum(increments),
            increments=increments,
            mean=mean,
            cov=cov,
            predicted_mean=predicted_mean,
            predicted_cov=predicted_cov,
            cross=cross,
            particles=particles,
            log_weights=jnp.full(particles.shape[:2], -jnp.log(1.0 * self.num_members)),
        )

    def _move(
        self, model: StateSpaceModel, key: PRNGKeyArray, members: _Ensemble, now: Any
    ) -> _Ensemble:
        t, dt, cache = now
        state_shape = () if model.scalar else (model.dim,)
        shape = model.scheme.innovation_shape(model.sde, state_shape)
        z = jax.random.normal(key, (self.num_members, *shape), members.dtype)

        def one(x: Array, z: Array) -> Array:
            return model.scheme.step(model.sde, t, dt, model.to_state(x), z, cache)

        return jnp.reshape(jax.vmap(one)(members, z), members.shape)

    def _inflate(self, members: _Ensemble) -> _Ensemble:
        if self.inflation == 1.0:
            return members
        center = jnp.mean(members, axis=0, keepdims=True)
        return center + self.inflation * (members - center)

    def _observe(
        self, model: StateSpaceModel, key: PRNGKeyArray, members: _Ensemble, now: Any
    ) -> tuple[_Ensemble, Array]:
        total = jnp.zeros((), members.dtype)
        for i, (instrument, data) in enumerate(zip(model.instruments, now, strict=True)):
            part = jax.random.fold_in(key, i)
            if instrument.gaussian or self.emission == "moments":
                new, log_density = _perturbed_update(part, members, instrument, data)
            else:
                new, log_density = _laplace_update(members, instrument, data, self.newton_steps)
            present = jnp.any(data[2])
            members = jnp.where(present, new, members)
            total = total + jnp.where(present, log_density, 0.0)
        return members, total


def _draw_start(model: StateSpaceModel, key: PRNGKeyArray, num_members: int) -> _Ensemble:
    z = jax.random.normal(key, (num_members, model.dim), model.init_mean.dtype)
    return model.init_mean[None] + matmul(z, transpose(psd_factor(model.init_cov)))


def _moments(members: _Ensemble) -> tuple[Array, Array]:
    return jnp.mean(members, axis=0), _covariance(members, members)


def _covariance(a: Array, b: Array) -> Array:
    a, b = (x - jnp.mean(x, axis=0, keepdims=True) for x in (a, b))
    return jnp.matmul(a.T, b, precision=lax.Precision.HIGHEST) / (a.shape[0] - 1)


def _perturbed_update(
    key: PRNGKeyArray, members: _Ensemble, instrument: Instrument, data: Any
) -> tuple[_Ensemble, Array]:
    """Move each member by the ensemble's gain towards its own perturbed observation."""
    inputs, y, present = data
    means, covs = jax.vmap(lambda x: instrument.moments(inputs, x))(members)
    means = jnp.where(present, means, 0.0)
    both = present[:, None] & present[None, :]
    R = jnp.where(both, jnp.mean(covs, axis=0), jnp.eye(y.shape[0], dtype=members.dtype))
    L = cholesky(symmetrize(_covariance(means, means)) + R)
    noise = jax.random.normal(key, means.shape, members.dtype)
    # Centred, the perturbations leave the mean of the ensemble to the data alone.
    noise = matmul(noise - jnp.mean(noise, axis=0, keepdims=True), transpose(cholesky(R)))
    residuals = jnp.where(present, y[None] + noise - means, 0.0)
    residual = jnp.where(present, y - jnp.mean(means, axis=0), 0.0)
    columns = [residuals.T, _covariance(means, members), residual[:, None]]
    white = solve_lower(L, jnp.concatenate(columns, axis=1))
    count = members.shape[0]
    moved = members + matmul(transpose(white[:, :count]), white[:, count:-1])
    log_density = -0.5 * jnp.sum(white[:, -1] ** 2) - jnp.sum(jnp.log(diagonal(L)))
    return moved, log_density - 0.5 * LOG_2PI * jnp.sum(present)


def _laplace_update(
    members: _Ensemble, instrument: Instrument, data: Any, newton_steps: int
) -> tuple[_Ensemble, Array]:
    """Move the members by the affine map that takes the prior Gaussian to the Laplace one.

    Where the emission is not log-concave the posterior may be wider than the prior, which no
    perturbed observation could do.
    """
    inputs, y, present = data
    mean, cov = _moments(members)
    S = psd_factor(cov)

    def emission(z: Array) -> Array:
        return instrument.log_prob(inputs, mean + matvec(S, z), y, present)

    mode, B, log_density = laplace(emission, jnp.zeros_like(mean), newton_steps)
    # A pivot of zero belongs to a direction in which the members do not differ.
    pivots = jnp.where(diagonal(S) == 0, 1.0, 0.0).astype(S.dtype)
    z = solve_lower(S + jnp.diag(pivots), transpose(members - mean[None]))
    z = mode[:, None] + solve_lower(B, z, transposed=True)
    return mean[None] + transpose(matmul(S, z)), log_density
