"""Tempered Hamiltonian moves between a standard normal reference and a posterior.

All latent values of a model become one vector `x` with the reference N(0, I): innovations as they
are, other sites by an affine map from the quantiles of their prior. With `R` the log of the joint
density over that of the reference, constants kept, the law at inverse temperature b is

    N(x; 0, I) exp(a(x) + b R(x)),

the reference at b = 0 and the posterior at b = 1, and the ratio of its two normalising constants is
the evidence. `a` is zero but along guided paths whose guide pulls with strength b: then `x` are the
normals of a path under that guide, `a` the log ratio of the path's law to the guide's, and `R` is a
function of path and parameters alone, the same at every level. So levels exchange paths, and each
moves them in coordinates that suit its temperature; the reference is the prior. A move splits off
the motion of the standard normal, a rotation that is done exactly, so that a finer grid does not
shorten the steps (Beskos, Pinski, Sanz-Serna and Stuart 2011, "Hybrid Monte Carlo on Hilbert
spaces").
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

from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.reparam.path import is_innovation
from numpyro_sde.reparam.strength import guided_by
from numpyro_sde.runtime.entry import entry_point

# In place of a log ratio that is not finite; its gradient is then taken for zero.
LOWEST = -1e8
# Draws of the prior behind the moments of sites that are no innovations.
_PRIOR_DRAWS = 400
_LARGEST_INNOVATION = 100.0
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
    model: Callable[..., Any], args: Any, kwargs: Any, key: PRNGKeyArray
) -> tuple[dict[str, Array], Reference]:
    """A point at the centre of the prior, unconstrained by site, and the reference there.

    Median and half the distance of the quantiles of a standard normal's 1 standard deviation: heavy
    tails of a prior do not make the reference wider than its bulk.
    """
    shapes = jax.eval_shape(prior_values(model, args, kwargs), key)
    drawn: dict[str, Array] = {}
    if not all(is_innovation(name) for name in shapes):
        keys = jax.random.split(key, _PRIOR_DRAWS)
        drawn = with_data_as_arguments(
            model, args, kwargs, lambda arguments: _prior_draws(model, arguments, keys)
        )
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


@entry_point
def _prior_draws(model: Callable[..., Any], arguments: Any, keys: PRNGKeyArray) -> dict[str, Array]:
    """Draws of all sites but innovations: what only the path needs is not asked for."""
    draw = prior_values(model, *released(arguments))

    def parameters(key: PRNGKeyArray) -> dict[str, Array]:
        return {name: v for name, v in draw(key).items() if not is_innovation(name)}

    return jax.vmap(parameters)(keys)


class Place(NamedTuple):
    """A point at one level, and what is known of it there.

    Attributes:
        x: the point.
        log_ratio: log of the joint density of model and data over the level's reference of the
            path and that of the other sites, `R`; of the path and the parameters alone.
        pull: log ratio of the laws of model and guide along guided paths, zero without a guide.
        slope: gradient of `pull + beta log_ratio`.
    """

    x: Float[Array, " D"]
    log_ratio: Float[Array, ""]
    pull: Float[Array, ""]
    slope: Float[Array, " D"]


class Level(NamedTuple):
    """A level of temperature: its inverse, and the strength of guides in its coordinates."""

    beta: Float[Array, "*levels"]
    strength: Float[Array, "*levels"]


class TemperedModel:
    """The laws of a model between its reference and its posterior, in coordinates of each level.

    With `from_prior` the guides of a level pull with its strength only: the reference is the prior,
    and a level has prior times a power of the likelihood, in the coordinates of a guide towards
    data that are weak to the same degree. Without, guides pull fully at all levels: the reference
    is prior times guide, and what the guide does not reach is not reached.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        back: from a vector to unconstrained values by site.
        reference: where the standard normal lies.
        from_prior: see above.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Any,
        kwargs: Any,
        back: Callable[[Array], dict[str, Array]],
        reference: Reference,
        from_prior: bool,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.back, self.reference, self.from_prior = back, reference, from_prior
        constant = jnp.sum(jnp.log(reference.spread))
        self.constant = constant + 0.5 * reference.loc.size * math.log(2.0 * math.pi)

    def level(self, beta: Float[Array, "*levels"]) -> Level:
        """The level of an inverse temperature."""
        return Level(beta, beta if self.from_prior else jnp.ones_like(beta))

    def look(self, x: Float[Array, " D"], level: Level) -> Place:
        """What is known at a point; finite whatever happens."""

        def value(x: Array) -> tuple[Array, tuple[Array, Array]]:
            z = self.back(self.reference.place(x))
            with guided_by(level.strength) as guides:
                log_joint = -potential_energy(self.model, self.args, self.kwargs, z)
            total = self.constant + log_joint + 0.5 * jnp.sum(x**2)
            pull = sum(guides.log_weights, jnp.zeros_like(total))
            # Innovations of a path that no law would draw: the digits of its density are lost.
            lost = sum((w > _LARGEST_INNOVATION for w in guides.largest), jnp.zeros((), bool))
            total = jnp.where(lost, -jnp.inf, total)
            if not self.from_prior:
                pull = jnp.zeros_like(total)
            ratio = total - pull
            return pull + level.beta * ratio, (ratio, pull)

        (found, (ratio, pull)), slope = jax.value_and_grad(value, has_aux=True)(x)
        finite = jnp.isfinite(ratio) & jnp.isfinite(pull) & jnp.isfinite(found)
        ratio = jnp.where(finite, jnp.maximum(ratio, LOWEST), LOWEST)
        slope = jnp.where(finite & jnp.all(jnp.isfinite(slope)), slope, jnp.zeros_like(slope))
        return Place(x, ratio, jnp.where(finite, pull, jnp.zeros_like(pull)), slope)

    def carry(self, x: Float[Array, " D"], level: Level, to: Level) -> Float[Array, " D"]:
        """The same path and parameters in the coordinates of another level."""
        if not self.from_prior:
            return x
        z = self.back(self.reference.place(x))
        with guided_by(level.strength, to.strength) as guides:
            potential_energy(self.model, self.args, self.kwargs, z)
        if not guides.moved:
            return x
        z = {name: guides.moved.get(name, value).astype(value.dtype) for name, value in z.items()}
        moved = (ravel_pytree(z)[0] - self.reference.loc) / self.reference.spread
        # What cannot be carried stays what it was; its density says so.
        return jnp.where(jnp.all(jnp.isfinite(moved)), moved, x)


def rotate(
    target: Callable[[Float[Array, " D"]], Place],
    num_steps: int,
    place: Place,
    beta: Float[Array, ""],
    step: Float[Array, ""],
    scale: Float[Array, " D"],
    key: PRNGKeyArray,
) -> tuple[Place, Float[Array, ""]]:
    """One tempered Hamiltonian move, and its acceptance probability.

    Args:
        target: looks at a point.
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
    cos, sin, half = jnp.cos(angle), jnp.sin(angle), 0.5 * angle

    def one(now: tuple[Place, Array], none: None) -> tuple[tuple[Place, Array], None]:
        place, q = now
        q = q + half * place.slope
        x, q = cos * place.x + sin * q, cos * q - sin * place.x
        place = target(x)
        return (place, q + half * place.slope), none

    (end, q), _ = jax.lax.scan(one, (place, momentum), None, length=num_steps)
    gain = beta * (end.log_ratio - place.log_ratio) + (end.pull - place.pull)
    # Differences of squares as products: their digits are those of the difference.
    gain = gain - 0.5 * jnp.sum((end.x - place.x) * (end.x + place.x))
    gain = gain - 0.5 * jnp.sum((q - momentum) * (q + momentum))
    accept = jnp.where(jnp.isnan(gain), 0.0, jnp.exp(jnp.minimum(gain, 0.0)))
    taken = jax.random.uniform(accept_key, (), accept.dtype) < accept
    return jax.tree.map(partial(jnp.where, taken), end, place), accept


def quarter_turn(num_steps: int) -> float:
    """Angle of a step with which a trajectory of the reference ends where its momentum points."""
    return 0.5 * math.pi / num_steps
