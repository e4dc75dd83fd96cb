"""Paths whose drift is linear in Gaussian weights, with the weights integrated out exactly.

Given the path, one step of a Gaussian scheme reads `x' = m(x) + Phi(x) w + e`, `e ~ N(0, C)`: a
regression on the weights w. With whitened rows A and residuals r (at the prior mean of w) and
whitened weights, `Lambda = I + sum A'A` and `b = sum A'r`,

    log p(x) = sum log N(r; 0, I) - 1/2 log |Lambda| + 1/2 b' Lambda^-1 b - sum log |C^1/2|,
    w | x ~ N(mean + sd Lambda^-1 b, sd Lambda^-1 sd)

(Bishop 2006, equations 3.53, 3.54 and 3.86, for one step of noise each).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.distributions.known_design import KnownDesign, known_design
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.small import diagonal, solve_lower
from numpyro_sde.schemes import Euler
from numpyro_sde.schemes.base import require_square


class WeightPrior(NamedTuple):
    """Independent normal weights.

    Attributes:
        loc: means, shape `(*plates, *weights)`.
        scale: standard deviations, of the same shape.
        event_dim: how many of the dimensions are one set of weights.
    """

    loc: Array
    scale: Array
    event_dim: int

    @property
    def plates(self) -> tuple[int, ...]:
        """Shape of the plates around the weights."""
        return self.loc.shape[: self.loc.ndim - self.event_dim]


class WeightsOf(NamedTuple):
    """How a field makes its weights of whitened ones.

    Attributes:
        at: the law at given whitened weights, and the weights that it holds, that very array.
        elementwise: whether each weight is a multiple of its own whitened one.
    """

    at: Callable[[Array], tuple[SDEPath, Array]]
    elementwise: bool


class WeightPosterior(NamedTuple):
    """Weights given a path, and the log density of the path.

    Attributes:
        log_evidence: one for each set of weights, shape `(*plates)` with as many dimensions as the
            path's batch.
        mean: of the whitened weights, shape `(*plates, m)`.
        root: lower factor of their precision, shape `(*plates, m, m)`.
    """

    log_evidence: Array
    mean: Array
    root: Array


def require_linear(
    law_of: Callable[[Array], SDEPath],
    prior: WeightPrior,
    x: Any,
    engine: str = "collapse",
    otherwise: str = "leave the weights to NUTS",
) -> None:
    """Refuse a path whose step is not normal with a mean linear in the weights.

    Args:
        law_of: the law of the path at given weights.
        prior: the weights' law.
        x: a path, for its shape.
        engine: who asks, for the message.
        otherwise: what to do without it, for the message.

    Raises:
        ValueError: naming the reason and what to do instead.
    """
    law = law_of(prior.loc)
    if not isinstance(law, SDEPath) or law.forcing is not None:
        raise ValueError(f"{engine} takes an SDEPath without inputs and events")
    name = type(law.scheme).__name__
    if not is_gaussian(law):
        raise ValueError(
            f"{engine} needs steps that are normal, and those of {name} are not. Use "
            f"scheme=Euler() with steps short enough for it, or {otherwise}"
        )
    x = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(float))
    closed = degrees(lambda z: steps(law_of(z), jnp.zeros(x.shape, x.dtype)), prior.loc)
    instead = (
        f"{otherwise[0].upper()}{otherwise[1:]}, without {engine}"
        if isinstance(law.scheme, Euler)
        else f"Use scheme=Euler() with steps short enough for it, or {otherwise}"
    )
    if closed[0] > 1:
        raise ValueError(
            f"{engine} needs a step of {name} whose mean is linear in the weights. {instead}"
        )
    if closed[1] > 0:
        raise ValueError(f"{engine} needs noise that does not depend on the weights. {instead}")
    starts = degrees(lambda z: jax.tree_util.tree_leaves(law_of(z).init), prior.loc)
    if any(starts):
        raise ValueError(f"{engine} needs an init that does not depend on the weights")


def is_gaussian(law: SDEPath) -> bool:
    """Whether the steps of a path are normal."""
    return law.scheme.gaussian_form(law.sde, law.state_shape) is not None


def steps(law: SDEPath, x: Array) -> tuple[Array, Array]:
    """Means of the next states, `(*lead, T - 1, *state)`, and factors of their covariances."""
    scheme = law.scheme.gaussian_form(law.sde, law.state_shape)
    assert scheme is not None
    lead = jnp.broadcast_shapes(law.batch_shape, x.shape[: x.ndim - law.event_dim])

    def moments(sde: Any, _: Any, times: Any, dt: Any, cache: Any, x: Array) -> Any:
        axes = (None, 0, 0, 0, None if cache is None else 0)
        return jax.vmap(scheme.moments, axes)(
            sde, jnp.asarray(times)[:-1], jnp.asarray(dt), x[:-1], cache
        )

    return law._map(moments, lead, (jnp.broadcast_to(x, lead + law.event_shape),), (law.event_dim,))


def weight_posterior(
    law_of: Callable[[Array], SDEPath],
    prior: WeightPrior,
    x: Float[ArrayLike, "*lead T *state"],
    weights_of: WeightsOf | None = None,
) -> WeightPosterior:
    """The weights given a path, and the path's log density with the weights integrated out.

    Args:
        law_of: the law of the path at given weights.
        prior: the weights' law.
        x: the path.
        weights_of: how the field makes weights of whitened ones; None where there is no field.
    """
    found = _from_known_design(prior, x, weights_of)
    if found is not None:
        return found
    law, x = law_of(prior.loc), jnp.asarray(x, jnp.result_type(float))
    residual, design, log_det = path_regression(law_of, prior, x)
    lead, size = residual.shape[:-1], design.shape[-1]
    plates = (1,) * (len(lead) - len(prior.plates)) + prior.plates
    own = _sum_to(jnp.swapaxes(design, -1, -2) @ design, plates)
    b = _sum_to((design * residual[..., None]).sum(-2), plates)
    root = jnp.linalg.cholesky(
        own + jnp.eye(size, dtype=own.dtype).reshape(*(1,) * len(lead), size, size)
    )
    half = jax.scipy.linalg.solve_triangular(root, b[..., None], lower=True)[..., 0]
    noise = -0.5 * (residual**2).sum(-1) - 0.5 * math.log(2 * math.pi) * residual.shape[-1]
    start = law.log_prob_pointwise(x)[..., 0]
    total = _sum_to(noise - log_det + start, plates)
    total = total + 0.5 * (half**2).sum(-1) - jnp.log(diagonal(root)).sum(-1)
    back = jax.scipy.linalg.solve_triangular(root, half[..., None], lower=True, trans=1)[..., 0]
    return WeightPosterior(total, back, root)


def path_regression(
    law_of: Callable[[Array], SDEPath], prior: WeightPrior, x: Float[Array, "*lead T *state"]
) -> tuple[Array, Array, Array]:
    """A path's steps as a regression on whitened weights, in units of their noise.

    Args:
        law_of: the law of the path at given weights.
        prior: where the steps are linearised, and the scale of a weight.
        x: the path.

    Returns:
        Residuals `(*lead, n)`, regressors `(*lead, n, m)` and the noise's log determinant
        `(*lead)`.
    """
    law = law_of(prior.loc)
    (mean, factor), slope = jax.linearize(lambda z: steps(law_of(z), x), prior.loc)
    lead = mean.shape[: mean.ndim - law.event_dim]
    one = prior.loc.shape[len(prior.plates) :]
    size = math.prod(one)
    # All sets of weights move at once: each series sees its own.
    units = jnp.eye(size, dtype=mean.dtype).reshape(size, *(1,) * len(prior.plates), *one)
    columns = jax.vmap(lambda unit: slope(unit * prior.scale)[0])(
        jnp.broadcast_to(units, (size, *prior.loc.shape))
    )
    after = x[..., 1:] if law.event_dim == 1 else x[..., 1:, :]
    rest = jnp.concatenate([jnp.broadcast_to(after, mean.shape)[None] - mean[None], columns])
    rows, log_det = _whitened(rest.reshape(size + 1, *lead, law.num_times - 1, -1), factor, law)
    return rows[0], jnp.moveaxis(rows[1:], 0, -1), log_det


def _from_known_design(
    prior: WeightPrior,
    x: Any,
    weights_of: WeightsOf | None,
) -> WeightPosterior | None:
    """The same where no parameter changes the regressors; None elsewhere."""
    if weights_of is None or prior.plates or isinstance(x, jax.core.Tracer):
        return None
    law, weights = weights_of.at(prior.loc)
    design = known_design(law, weights, x)
    if design is None:
        return None
    columns = law.sde.diffusion_columns_at(law.times[0], jnp.zeros(law.state_shape))
    columns = columns.reshape(math.prod(law.state_shape), -1)
    # The field's weights are linear in the whitened ones.
    if weights_of.elementwise:
        ones = jnp.ones_like(prior.loc)
        mixing = jax.jvp(lambda z: weights_of.at(z)[1], (prior.loc,), (ones,))[1].reshape(-1)
    else:
        mixing = jax.jacfwd(lambda z: weights_of.at(z)[1])(prior.loc).reshape(weights.size, -1)
    x = jnp.asarray(x, jnp.result_type(float))
    start = law.init.log_prob(x[..., 0] if law.event_dim == 1 else x[..., 0, :]).sum()
    found = _solved(design, columns, mixing, prior.scale, weights, start)
    lead = (1,) * (x.ndim - law.event_dim)
    return WeightPosterior(*(a.reshape(*lead, *a.shape) for a in found))


@jax.jit
def _solved(
    design: KnownDesign, columns: Array, mixing: Array, scale: Array, at_mean: Array, start: Array
) -> WeightPosterior:
    """The regression solved for whitened weights, `w = at_mean + mixing (scale z)`."""
    gram, b, log_density = design.regression(columns @ columns.T)
    at_mean, scale = at_mean.reshape(-1), scale.reshape(-1)
    log_density = log_density + b @ at_mean - 0.5 * at_mean @ gram @ at_mean
    if mixing.ndim == 1:
        mixing = mixing * scale
        b = mixing * (b - gram @ at_mean)
        gram = mixing[:, None] * gram * mixing[None]
    else:
        mixing = mixing * scale[None]
        b = mixing.T @ (b - gram @ at_mean)
        gram = mixing.T @ gram @ mixing
    total = log_density + start + _log_integral(gram, b)
    root = jnp.linalg.cholesky(gram + jnp.eye(len(b), dtype=b.dtype))
    half = jax.scipy.linalg.solve_triangular(root, b, lower=True)
    back = jax.scipy.linalg.solve_triangular(root, half, lower=True, trans=1)
    return WeightPosterior(total, back, root)


@jax.custom_jvp
def _log_integral(A: Array, b: Array) -> Array:
    """`log int exp(b'z - z'A z / 2) N(z; 0, I) dz`."""
    return _log_integral_jvp((A, b), (jnp.zeros_like(A), jnp.zeros_like(b)))[0]


@_log_integral.defjvp
def _log_integral_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # The derivatives are moments of z: cheaper than those of a factorisation.
    (A, b), (dA, db) = primals, tangents
    eye = jnp.eye(len(b), dtype=b.dtype)
    root = jnp.linalg.cholesky(A + eye)
    covariance = jax.scipy.linalg.cho_solve((root, True), eye)
    mean = covariance @ b
    value = 0.5 * b @ mean - jnp.log(diagonal(root)).sum()
    second = covariance + mean[:, None] * mean[None]
    return value, mean @ db - 0.5 * jnp.sum(second * dA)


def _whitened(rest: Array, factor: Array, law: SDEPath) -> tuple[Array, Array]:
    """Rows in units of the noise, `(k, *lead, n)`, and the noise's log determinant, `(*lead)`."""
    d = rest.shape[-1]
    lead = rest.shape[1:-2]
    if factor.ndim - len(lead) == law.event_dim:  # independent components
        factor = factor.reshape(*lead, -1, d)
        rows, log_det = rest / factor[None], jnp.log(jnp.abs(factor)).sum((-1, -2))
    else:
        require_square(factor)
        flat = jnp.moveaxis(rest, 0, -1)  # (*lead, T - 1, d, k)
        rows = jnp.moveaxis(solve_lower(factor, flat), -1, 0)
        log_det = jnp.log(jnp.abs(diagonal(factor))).sum((-1, -2))
    return rows.reshape(rest.shape[0], *lead, -1), log_det


def _sum_to(a: Array, plates: tuple[int, ...]) -> Array:
    """Sum over the leading dimensions of series that share a set of weights."""
    axes = tuple(i for i, n in enumerate(plates) if n == 1 and a.shape[i] != 1)
    return a.sum(axes, keepdims=True) if axes else a


def draw_weights(
    posterior: WeightPosterior, prior: WeightPrior, key: PRNGKeyArray
) -> Float[Array, "*shape"]:
    """One draw of the weights, of the shape of the prior's."""
    eps = jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
    spread = jax.scipy.linalg.solve_triangular(posterior.root, eps[..., None], lower=True, trans=1)
    white = (posterior.mean + spread[..., 0]).reshape(prior.loc.shape)
    return prior.loc + prior.scale * white


class CollapsedPath(dist.Distribution):
    """The law of a path with Gaussian weights of its drift integrated out.

    Series that share weights are dependent: `log_prob` spreads the total of their joint density
    evenly, so that its sum is right and its parts say nothing of single series.

    Args:
        law_of: the law of the path at given weights.
        prior: the weights' law.
        weights_of: as for `weight_posterior`.
    """

    def __init__(
        self,
        law_of: Callable[[Array], SDEPath],
        prior: WeightPrior,
        weights_of: WeightsOf | None = None,
    ) -> None:
        self.law_of, self.prior, self.weights_of = law_of, prior, weights_of
        law = law_of(prior.loc)
        super().__init__(law.batch_shape, law.event_shape)

    @property
    def support(self) -> Any:
        return self.law_of(self.prior.loc).support

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        """Paths, each from its own draw of the weights."""

        def one(key: PRNGKeyArray) -> Array:
            key_z, key_x = jax.random.split(key)
            z = jax.random.normal(key_z, self.prior.loc.shape, self.prior.loc.dtype)
            return self.law_of(self.prior.loc + self.prior.scale * z).sample(key_x)

        if not sample_shape:
            return one(key)
        draws = jax.vmap(one)(jax.random.split(key, math.prod(sample_shape)))
        return draws.reshape(*sample_shape, *self.shape())

    def weights_given(self, value: ArrayLike) -> WeightPosterior:
        """The weights given a path."""
        return weight_posterior(self.law_of, self.prior, value, self.weights_of)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        total = self.weights_given(value).log_evidence
        lead = jnp.broadcast_shapes(
            self.batch_shape, jnp.shape(value)[: jnp.ndim(value) - self.event_dim]
        )
        shared = math.prod(lead) // max(total.size, 1)
        total, like = equal_rank(total, jnp.zeros(lead, total.dtype))
        return total / shared + like
