"""Steps of a reaction network in whole numbers: exact jumps, and the Euler-multinomial step."""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.schemes.inversion import binomial, poisson
from numpyro_sde.schemes.keyed import KeyedScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class CountScheme(KeyedScheme):
    """A step of a reaction network whose states are counts; subclasses say how they move.

    Example:
        >>> from numpyro_sde import schemes
        >>> schemes.Gillespie.smooth, schemes.Gillespie.has_density
        (False, False)
    """

    has_density: ClassVar[bool] = False
    taken_by: ClassVar[str] = (
        "filters.Particle(proposal='bootstrap') or 'auxiliary', infer.PMMH, or under "
        "laws.Jump() filters.Forward(bounds=...)"
    )
    restarts: ClassVar[bool] = True
    counts: ClassVar[bool] = True

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        from numpyro_sde.jumps.reactions import ReactionNetwork  # it is an SDE with schemes

        if not isinstance(sde, ReactionNetwork):
            raise ValueError(
                f"{type(self).__name__} moves the counts of a reaction network, got a "
                f"{type(sde).__name__}: give the path an nsde.ReactionNetwork"
            )

    @abstractmethod
    def fired(self, sde: Any, key: PRNGKeyArray, dt: Array, x: Array) -> tuple[Array, Array]:
        """New counts of the species after a step, and how often each reaction fired."""

    def draw(
        self, sde: Any, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        del t, cache
        species = x[: sde.num_species]
        species, fired = self.fired(sde, key, dt, species)
        return jnp.concatenate([species, fired[np.array(sde.accumulated, int)]]).astype(x.dtype)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        raise TypeError(
            f"{type(self).__name__} has no transition density that could be evaluated: simulate it "
            "in filters.Particle(proposal='bootstrap'), or use filters.Forward(bounds=...)"
        )


class Gillespie(CountScheme):
    """Exact jumps of a reaction network: the stochastic simulation algorithm.

    Gillespie (1977), J. Phys. Chem. 81: waiting times and reactions one after the other. The cost
    is that of the events; where many thousands happen between two data use `EulerMultinomial` or
    `LinearNoise`.

    Args:
        max_events: most reactions in one step; a step with more is NaN.

    Raises:
        ValueError: a number below 1.
        TypeError: a number that is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> decay = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
        >>> path = nsde.SDEPath(decay, [0.0, 1.0, 50.0], jnp.array([20.0]),
        ...                     scheme=nsde.schemes.Gillespie())
        >>> path.sample(jax.random.key(0))[:, 0].tolist()[::2]
        [20.0, 0.0]
    """

    max_events: int = eqx.field(static=True)

    def __init__(self, max_events: int = 100_000) -> None:
        self.max_events = _count("max_events", max_events)

    def fired(self, sde: Any, key: PRNGKeyArray, dt: Array, x: Array) -> tuple[Array, Array]:
        changes = jnp.asarray(sde.stoichiometry.T, x.dtype)
        dt = jnp.asarray(dt, x.dtype)

        def wait(key: PRNGKeyArray, x: Array) -> tuple[Array, Array]:
            rates = sde.counted_rates(x)
            total = jnp.sum(rates)
            u = jax.random.uniform(key, (2,), x.dtype, minval=jnp.finfo(x.dtype).tiny)
            chosen = jnp.sum(jnp.cumsum(rates) < u[1] * total)
            idle = total <= 0.0
            return jnp.where(idle, jnp.inf, -jnp.log(u[0]) / jnp.where(idle, 1.0, total)), chosen

        def more(carry: Any) -> Array:
            time, _, _, _, number = carry
            return (time < dt) & (number <= self.max_events)

        def react(carry: Any) -> Any:
            time, chosen, x, fired, number = carry
            x = x + changes[chosen]
            gap, following = wait(jax.random.fold_in(key, number), x)
            # Not `fired.at[chosen]`: among particles that is a scatter, itself a loop on a CPU.
            now = (jnp.arange(fired.size) == chosen).astype(fired.dtype)
            return time + gap, following, x, fired + now, number + 1

        gap, chosen = wait(jax.random.fold_in(key, 0), x)
        none = jnp.zeros(changes.shape[0], x.dtype)
        start = (gap, chosen, x, none, jnp.ones((), jnp.int32))
        time, _, x, fired, _ = lax.while_loop(more, react, start)
        complete = time >= dt  # false for NaN too
        return jnp.where(complete, x, jnp.nan), jnp.where(complete, fired, jnp.nan)


class EulerMultinomial(CountScheme):
    """Counts leave each compartment by a multinomial law over short steps of constant hazards.

    Of the n individuals of a species that reactions of hazards `r_1, r_2, ...` use up, each one
    leaves within `h` with probability `1 - exp(-h sum r)`, by reaction i with probability
    proportional to `r_i` (Bretó, He, Ionides and King 2009, Annals of Applied Statistics 3): counts
    never become negative. Reactions that use up nothing fire by a Poisson law. Biased by the length
    of the step, as Euler's scheme is.

    Args:
        substeps: equal parts of each step of the grid.
        noise: intensity of gamma white noise on the hazards of some reactions, by name or number,
            `{"infection": 0.1}`: within h the hazard is multiplied by a gamma variable of mean 1
            and variance `noise^2 / h` (units: square root of time).

    Raises:
        ValueError: a number below 1, or noise that is not positive. In use: a reaction that uses up
            more than one individual of one species.
        TypeError: a number that is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> decay = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
        >>> path = nsde.SDEPath(decay, [0.0, 1.0, 50.0], jnp.array([20.0]),
        ...                     scheme=nsde.schemes.EulerMultinomial(substeps=4))
        >>> path.sample(jax.random.key(0))[:, 0].tolist()[::2]
        [20.0, 0.0]
    """

    substeps: int = eqx.field(static=True)
    noise: tuple[tuple[Any, float], ...] = eqx.field(static=True)

    def __init__(self, substeps: int = 1, *, noise: dict[Any, float] | None = None) -> None:
        self.substeps = _count("substeps", substeps)
        noise = {} if noise is None else noise
        for name, value in noise.items():
            if not value > 0.0:
                raise ValueError(f"noise[{name!r}] must be positive, got {value}")
        self.noise = tuple((name, float(value)) for name, value in noise.items())

    def check(self, sde: Any, state_shape: tuple[int, ...]) -> None:
        super().check(sde, state_shape)
        _exits(sde)
        for name, _ in self.noise:
            sde.reaction_number(name)

    def fired(self, sde: Any, key: PRNGKeyArray, dt: Array, x: Array) -> tuple[Array, Array]:
        exits = _exits(sde)
        noisy = {sde.reaction_number(name): value for name, value in self.noise}
        changes = jnp.asarray(sde.stoichiometry, x.dtype)
        h = jnp.asarray(dt, x.dtype) / self.substeps

        def substep(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
            x, total = carry
            own = jax.random.fold_in(key, k)
            rates = sde.counted_rates(x)
            if noisy:
                rates = _with_gamma_noise(jax.random.fold_in(own, 1), rates, noisy, h)
            u = jax.random.uniform(own, rates.shape, x.dtype)
            fired = _leave(u, exits, rates, x, h)
            return (x + changes @ fired, total + fired), None

        start = (x, jnp.zeros(changes.shape[1], x.dtype))
        return lax.scan(substep, start, jnp.arange(self.substeps))[0]


def _exits(sde: Any) -> dict[int | None, list[int]]:
    """Reactions by the species of which they use up one individual; None for no species."""
    found: dict[int | None, list[int]] = {}
    for r, change in enumerate(np.asarray(sde.stoichiometry).T):
        used = np.flatnonzero(change < 0)
        if used.size > 1 or (used.size == 1 and change[used[0]] != -1):
            raise ValueError(
                f"EulerMultinomial: reaction {sde.reactions[r]!r} uses up "
                f"{-change[used].sum()} individuals at once, but an individual must leave one "
                "compartment by itself: use Gillespie() (laws.Jump()) or Langevin()"
            )
        found.setdefault(int(used[0]) if used.size else None, []).append(r)
    return found


def _with_gamma_noise(key: PRNGKeyArray, rates: Array, noisy: dict[int, float], h: Array) -> Array:
    for number, (r, sigma) in enumerate(noisy.items()):
        shape = h / sigma**2
        factor = jax.random.gamma(jax.random.fold_in(key, number), shape, dtype=h.dtype) / shape
        rates = rates.at[r].multiply(factor)
    return rates


def _leave(u: Array, exits: dict[int | None, list[int]], rates: Array, x: Array, h: Array) -> Array:
    """How often each reaction fires within `h`, from uniform numbers."""
    fired = [jnp.zeros((), x.dtype)] * rates.shape[0]
    for species, reactions in exits.items():
        if species is None:
            for r in reactions:
                fired[r] = poisson(u[r], rates[r] * h)
            continue
        left = x[species]
        hazards = jnp.stack([rates[r] for r in reactions]) / jnp.maximum(left, 1.0)
        total = jnp.sum(hazards)
        stays = jnp.exp(-h * total)
        for place, r in enumerate(reactions):
            rest = jnp.sum(hazards[place:])
            positive = rest > 0.0
            share = hazards[place] / jnp.where(positive, rest, 1.0)
            # Of those that did not leave by an earlier one, who are to leave or to stay.
            leaving = -jnp.expm1(-h * total) * rest / jnp.where(total > 0.0, total, 1.0)
            chance = leaving * share / (leaving + stays)
            fired[r] = binomial(u[r], left, jnp.where(positive, chance, 0.0))
            left = left - fired[r]
    return jnp.stack(fired)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
