r"""`ConditionalScorePath`: a path law from the backward equation, and its residual.

With `h_k(x)` the likelihood of the observations from grid time k on, given the state there, the
smoothing law is the model's with each step reweighted by `h_{k+1}` (Doob's transform), and

    h_k(x) = g_k(x) E[ h_{k+1}(X_{k+1}) | X_k = x ],

g_k being the emission's density where something is observed and 1 elsewhere. As steps shrink this
is Kolmogorov's backward equation between observations with jumps at them. Here
`log h = log h_guide + n`, where `h_guide` is the guide's Gaussian form, exact for linear Gaussian
models, and n a network of time and state; its gradient, the conditional score less the guide's,
steers the path.

Source: "Variational Smoothing and Inference for SDEs from Sparse Data with Dynamic Neural Flows"
(2026, arXiv:2605.05606), which trains the score on the differential equation; the form on the
grid is that of twisting functions (Heng, Bishop, Deligiannidis, Doucet 2020, "Controlled
sequential Monte Carlo"), and has no error of discretisation of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.guides.flows import Conditioner, bounded_input
from numpyro_sde.guides.path_laws import (
    Place,
    Sizes,
    SteeredPath,
    check_widths,
    num_features,
    observation_spacing,
    observed_rows,
    time_features,
)
from numpyro_sde.guides.steps import Control, Pull, pull_of
from numpyro_sde.linear.small import diagonal, matvec, solve_lower, transpose
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.statespace.guide import affine_step, log_emissions
from numpyro_sde.statespace.model import StateSpaceModel

# Collocation points off the paths: states are moved by a normal of this share of their spread.
_JITTER = 0.5


class ConditionalScorePath(SteeredPath):
    """The posterior SDE steered by a learned conditional score.

    A scalar network corrects the guide's log likelihood of the observations to come; its gradient
    in the state is the control. `fit_score` trains it on the backward equation and its jumps,
    without simulating gradients through paths, and `SVI` on the bound; the two can be alternated.
    A scale for every step is learned too, by the bound alone. The residual is no bound: report
    the importance-weighted evidence.

    Args:
        hidden_dims: widths of the network's hidden layers.
        jump_weight: weight of the residual at observations against that between them.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(-1.0, 0.1)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> guide = nsde.guides.AutoPathGuide(model, path=nsde.guides.ConditionalScorePath((8,)))
        >>> y = jax.numpy.array([-0.9, -1.2, -1.0])
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace(y)
        >>> list(sites)  # train it by SVI, or with `fit_score`
        ['x_auto_network', 'x_auto_start_shift', 'x_auto_start_factor', 'x_auto_scale', 'x']
    """

    hidden_dims: tuple[int, ...] = eqx.field(static=True)
    jump_weight: float = eqx.field(static=True)

    def __init__(
        self, hidden_dims: tuple[int, ...] = (32, 32), *, jump_weight: float = 10.0
    ) -> None:
        self.hidden_dims = check_widths(hidden_dims)
        if not jump_weight > 0:
            raise ValueError(f"jump_weight must be positive, got {jump_weight}")
        self.jump_weight = jump_weight

    def shared_params(self, prefix: str, sizes: Sizes) -> Any:
        inputs = num_features() + sizes.dim + sizes.num_theta
        return numpyro.param(
            f"{prefix}_network", lambda key: Conditioner.create(key, inputs, self.hidden_dims, 1)
        )

    def local_dims(self) -> dict[str, int]:
        return {"scale": 2}

    def local_params(self, prefix: str, sizes: Sizes, lead: tuple[int, ...]) -> dict[str, Array]:
        shape = (*lead, sizes.num_steps, sizes.num_noises)
        return {"scale": numpyro.param(f"{prefix}_scale", jnp.zeros(shape), event_dim=2)}

    def _prepare(
        self, model: StateSpaceModel, place: Place, network: Any, local: Any
    ) -> tuple[Control, Any]:
        def control(now: Any, pull: Pull) -> tuple[Array, Array]:
            features, scale = now
            slope = jax.grad(lambda x: correction(network, place, features, x))(pull.mean)
            slope = pull.B * slope if pull.B.ndim == 1 else matvec(transpose(pull.B), slope)
            return solve_lower(pull.L, slope[:, None])[:, 0], scale

        return control, (time_features(model)[1:], local["scale"])

    def residual(
        self, model: StateSpaceModel, place: Place, network: Any, path: Array, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """Mean squared residual of the backward equation around a path, jumps weighted.

        Between observations it is that of the differential equation, in units of the distance
        between observations; at them, of the jump.
        """
        states = model.scheme.lift(model.sde, model.times, model.dt, path, model.cache)
        states = jnp.reshape(states, (model.num_times, -1))
        moved = jax.random.normal(key, states.shape, states.dtype)
        x = jax.lax.stop_gradient(states + _JITTER * place.spread[None] * moved)
        gap = _residuals(model, place, network, x)
        jumps = np.zeros(model.num_times, bool)
        jumps[observed_rows(model)] = True
        jumps[-1] = True
        unit = jnp.append(observation_spacing(model) / jnp.asarray(model.dt), 1.0)
        weight = jnp.where(jumps, self.jump_weight, unit**2)
        return jnp.mean(jnp.where(jumps, 0.0, weight * gap**2)) + jnp.sum(
            jnp.where(jumps, weight * gap**2, 0.0)
        ) / max(int(jumps.sum()), 1)


def correction(network: Any, place: Place, features: Array, x: Array) -> Array:
    """The network: log likelihood of what is to come, less the guide's."""
    seen = bounded_input((x - place.center) / place.spread)
    return network(jnp.concatenate([features, seen, place.theta]))[0]


class _Ahead(NamedTuple):
    """A step seen from its start, and what the guide makes of the observations after it."""

    pull: Pull
    log_guide: Array


def _look_ahead(model: StateSpaceModel, step: Any, x: Array) -> _Ahead:
    """The guide's log likelihood of what comes after a step, from its start, up to a constant."""
    (t, dt, cache), H, e, following = step
    mean, B = affine_step(model, t, dt, x, cache)
    a = mean - following
    pull = pull_of(H, e, x, mean, a, B)
    quadratic = -0.5 * a @ matvec(H, a) + e @ a + 0.5 * jnp.sum(pull.half**2)
    return _Ahead(pull, quadratic - jnp.sum(jnp.log(diagonal(pull.L))))


def _residuals(
    model: StateSpaceModel, place: Place, network: Any, x: Float[Array, "N d"]
) -> Float[Array, " N"]:
    """`log h_k` less what the equation makes of `log h_{k+1}`, at one state for each time."""
    guide, features = place.along.guide, time_features(model)
    steps = (model.step_inputs(), guide.H[1:], guide.e[1:], guide.reference[1:])
    points, weights = _nodes(place.along.linear.B.shape[-1])
    log_g = log_emissions(model, x)

    def quadratic(H: Array, e: Array, d: Array) -> Array:
        return -0.5 * d @ matvec(H, d) + e @ d

    def expected(step: Any, features: Array, x: Array) -> tuple[Array, Array]:
        ahead = _look_ahead(model, step, x)
        pull = ahead.pull

        def at(point: Array) -> Array:
            v = (pull.half + point)[:, None]
            w = solve_lower(pull.L, v, transposed=True)[:, 0]
            return correction(network, place, features, _moved(model, step[0], pull, w))

        log_mean = logsumexp(jax.vmap(at)(points), b=weights)
        return ahead.log_guide, log_mean

    log_guide, log_mean = jax.vmap(expected)(steps, features[1:], x[:-1])
    at_reference = jax.vmap(lambda step, x: _look_ahead(model, step, x).log_guide)(
        steps, guide.reference[:-1]
    )
    # Constants of the guide's form are such that it is exact at the reference.
    constant = log_emissions(model, guide.reference)
    mine = jax.vmap(lambda f, x: correction(network, place, f, x))(features, x)
    mine = mine + jax.vmap(quadratic)(guide.H, guide.e, x - guide.reference) + constant
    theirs = jnp.append(log_guide - at_reference + log_mean, 0.0)
    return mine - log_g - theirs


def _moved(model: StateSpaceModel, step: Any, pull: Pull, w: Array) -> Array:
    t, dt, cache = step
    scheme = model.scheme
    if isinstance(scheme, GaussianScheme):
        return pull.mean + (pull.B * w if pull.B.ndim == 1 else matvec(pull.B, w))
    shape = scheme.innovation_shape(model.sde, jnp.shape(model.to_state(pull.x)))
    state = scheme.step(model.sde, t, dt, model.to_state(pull.x), jnp.reshape(w, shape), cache)
    return jnp.reshape(state, (model.dim,))


def _nodes(m: int) -> tuple[Array, Array]:
    """Points and weights of a standard normal: Gauss-Hermite of one noise, cubature of several."""
    if m == 1:
        points, weights = np.polynomial.hermite_e.hermegauss(3)
        return jnp.asarray(points[:, None]), jnp.asarray(weights / weights.sum())
    eye = np.sqrt(m) * np.eye(m)
    return jnp.asarray(np.concatenate([eye, -eye])), jnp.full(2 * m, 0.5 / m)
