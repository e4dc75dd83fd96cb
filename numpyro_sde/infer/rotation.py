"""Tempered Hamiltonian moves between a standard normal reference and a posterior.

All latent values of a model become one vector `x` with the reference N(0, I): innovations as they
are, other sites by an affine map from the moments of their prior. With `l(x)` the log joint density
over that of the reference, constants kept, the law at inverse temperature b is

    N(x; 0, I) exp(b l(x)),

the reference at b = 0 (along guided paths: prior times guide) and the posterior at b = 1, and the
ratio of its two normalising constants is the evidence. A move splits off the motion of the standard
normal, a rotation that is done exactly, so that a finer grid does not shorten the steps (Beskos,
Pinski, Sanz-Serna and Stuart 2011, "Hybrid Monte Carlo on Hilbert spaces").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import biject_to
from numpyro.handlers import seed, trace
from numpyro.infer.util import potential_energy

from numpyro_sde.reparam.path import is_innovation

# In place of a log ratio that is not finite; its gradient is then taken for zero.
LOWEST = -1e8
# Draws of the prior behind the moments of sites that are no innovations.
_PRIOR_DRAWS = 400
_NARROWEST = 1e-3


class Reference(NamedTuple):
    """Where the standard normal reference lies among unconstrained values.

    Attributes:
        loc: unconstrained value at `x = 0`, sites joined as `ravel_pytree` does, `(D,)`.
        spread: change of it for a unit of `x`, `(D,)`.
    """

    loc: Float[Array, " D"]
    spread: Float[Array, " D"]

    def place(self, x: Float[Array, " D"]) -> Float[Array, " D"]:
        """Unconstrained values at a point."""
        return self.loc + self.spread * x


def prior_values(
    model: Callable[..., Any], args: Any, kwargs: Any
) -> Callable[[PRNGKeyArray], dict[str, Array]]:
    """What draws all latent sites of a model from their laws, unconstrained.

    Raises:
        ValueError: when called, where a latent site is discrete or has no law to draw from.
    """

    def draw(key: PRNGKeyArray) -> dict[str, Array]:
        try:
            sites = trace(seed(model, key)).get_trace(*args, **kwargs)
        except NotImplementedError as error:
            raise ValueError(
                "tempering begins at the prior, and a site of the model cannot be drawn from its "
                f"own: give every latent site a proper law ({error})"
            ) from error
        values = {}
        for name, site in sites.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            support = site["fn"].support
            if support.is_discrete:
                raise ValueError(
                    f"tempering moves real numbers, and site {name!r} is discrete "
                    f"({type(site['fn']).__name__}): integrate a JumpPath out by "
                    "handlers.marginalize(model, method=filters.Forward())"
                )
            value = biject_to(support).inv(site["value"])
            values[name] = jnp.asarray(value, jnp.result_type(float))
        if not values:
            raise ValueError("the model has no latent site")
        return values

    return draw


def prior_reference(
    draw: Callable[[PRNGKeyArray], dict[str, Array]], key: PRNGKeyArray
) -> tuple[dict[str, Array], Reference]:
    """A point at the centre of the prior, unconstrained by site, and the reference there.

    Median and half the distance of the quantiles of a standard normal's 1 standard deviation: heavy
    tails of a prior do not make the reference wider than its bulk.
    """
    shapes = jax.eval_shape(draw, key)

    def parameters(key: PRNGKeyArray) -> dict[str, Array]:
        return {name: v for name, v in draw(key).items() if not is_innovation(name)}

    drawn: dict[str, Array] = {}
    if not all(is_innovation(name) for name in shapes):
        # What only the path needs is not computed: its values are not asked for.
        drawn = jax.jit(jax.vmap(parameters))(jax.random.split(key, _PRIOR_DRAWS))
    loc, spread = {}, {}
    for name, shape in shapes.items():
        if name not in drawn:
            loc[name], spread[name] = np.zeros(shape.shape), np.ones(shape.shape)
            continue
        values = np.asarray(drawn[name], np.float64)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"draws of site {name!r} from its prior are not finite")
        low, loc[name], high = np.quantile(values, [0.158655, 0.5, 0.841345], axis=0)
        spread[name] = np.maximum(0.5 * (high - low), _NARROWEST)
    dtype = jnp.result_type(float)
    loc, spread = (jax.tree.map(lambda a: jnp.asarray(a, dtype), t) for t in (loc, spread))
    return loc, Reference(ravel_pytree(loc)[0], ravel_pytree(spread)[0])


def log_ratio(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    back: Callable[[Array], dict[str, Array]],
    reference: Reference,
) -> Callable[[Float[Array, " D"]], tuple[Float[Array, ""], Float[Array, " D"]]]:
    """The log joint density over the reference's, and its gradient; finite whatever happens."""
    constant = jnp.sum(jnp.log(reference.spread))
    constant = constant + 0.5 * reference.loc.size * math.log(2.0 * math.pi)

    def value(x: Array) -> Array:
        potential = potential_energy(model, args, kwargs, back(reference.place(x)))
        return constant - potential + 0.5 * jnp.sum(x**2)

    def both(x: Array) -> tuple[Array, Array]:
        found, slope = jax.value_and_grad(value)(x)
        finite = jnp.isfinite(found)
        slope = jnp.where(finite & jnp.all(jnp.isfinite(slope)), slope, jnp.zeros_like(slope))
        return jnp.where(finite, jnp.maximum(found, LOWEST), LOWEST), slope

    return both


class Place(NamedTuple):
    """A point with the log ratio and its gradient there."""

    x: Float[Array, " D"]
    log_ratio: Float[Array, ""]
    slope: Float[Array, " D"]


def unknown_place(x: Float[Array, " D"]) -> Place:
    """A point that has not been looked at: the first move leaves it."""
    return Place(x, jnp.full(x.shape[:-1], LOWEST, x.dtype), jnp.zeros_like(x))


def rotate(
    target: Callable[[Float[Array, " D"]], tuple[Float[Array, ""], Float[Array, " D"]]],
    num_steps: int,
    place: Place,
    beta: Float[Array, ""],
    step: Float[Array, ""],
    scale: Float[Array, " D"],
    key: PRNGKeyArray,
) -> tuple[Place, Float[Array, ""]]:
    """One tempered Hamiltonian move, and its acceptance probability.

    Args:
        target: log ratio and gradient.
        num_steps: steps of the trajectory.
        place: where it begins.
        beta: inverse temperature.
        step: angle of a step where `scale` is one.
        scale: standard deviation of each coordinate, as its inverse mass has it.
        key: random key.
    """
    momentum_key, accept_key = jax.random.split(key)
    momentum = jax.random.normal(momentum_key, place.x.shape, place.x.dtype)
    angle = step * scale
    cos, sin, half = jnp.cos(angle), jnp.sin(angle), 0.5 * beta * angle

    def one(now: tuple[Place, Array], none: None) -> tuple[tuple[Place, Array], None]:
        (x, _, slope), q = now
        q = q + half * slope
        x, q = cos * x + sin * q, cos * q - sin * x
        value, slope = target(x)
        return (Place(x, value, slope), q + half * slope), none

    (end, q), _ = jax.lax.scan(one, (place, momentum), None, length=num_steps)
    gain = beta * (end.log_ratio - place.log_ratio)
    # Differences of squares as products: their digits are those of the difference.
    gain = gain - 0.5 * jnp.sum((end.x - place.x) * (end.x + place.x))
    gain = gain - 0.5 * jnp.sum((q - momentum) * (q + momentum))
    accept = jnp.where(jnp.isnan(gain), 0.0, jnp.exp(jnp.minimum(gain, 0.0)))
    taken = jax.random.uniform(accept_key, (), accept.dtype) < accept
    return jax.tree.map(partial(jnp.where, taken), end, place), accept


def quarter_turn(num_steps: int) -> float:
    """Angle of a step with which a trajectory of the reference ends where its momentum points."""
    return 0.5 * math.pi / num_steps
