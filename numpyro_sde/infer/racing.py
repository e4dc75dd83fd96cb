"""Which proposal, and how many particles: filters raced at several parameter values.

One filter at one parameter value says little: a proposal that is exact near the mode may miss half
of a path's law a standard deviation away, and say so by nothing but a low likelihood. So
candidates run several times each at points spread over the posterior. A candidate whose estimate is
confidently below another's is dropped; of the rest the one with the least variance for its time is
taken; and the number of particles is set where the estimate is worst, not where it is best.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.infer.util import potential_energy

from numpyro_sde.filters.particle import Particle, is_above
from numpyro_sde.filters.particle_result import ParticleResult
from numpyro_sde.filters.rao_blackwell import RaoBlackwell
from numpyro_sde.handlers import marginalize
from numpyro_sde.infer.start import Start
from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.smc.defensive import Defensive, is_linear_gaussian
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.proposals import Proposal
from numpyro_sde.statespace.bounds import largest_log_likelihood
from numpyro_sde.statespace.exact import has_exact
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel

NUM_POINTS, NUM_RUNS = 16, 8
# Degrees of freedom of the law of the points, and its scale in those of the start's covariance.
_FREEDOM, _WIDTH = 5, 2.0
# Proposals whose weights are bounded by the emissions; others must be better by this factor, as the
# variance that they show in a few runs lacks what they miss.
_BOUNDED = ("bootstrap", "defensive")
_DOUBT = 4.0
# Points hold mass where their log density is at most so far below the highest.
_MASS = 8.0
# Central are those of the better half that are at most so far below the highest.
_CENTRAL = 4.0
# Where no bounded proposal's estimates are this steady, their level tells nothing: more particles.
_TELLING_SD, _MORE, _MOST_RACED = 1.5, 8, 512


class LikelihoodEstimator(Particle):
    """A particle filter inside an engine: no warnings, no refusal, no impossible values."""

    # Equinox would otherwise make another constructor from the fields.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        setting, plan, _, key = self._raced(model)
        value = run_filter(model, setting, key, plan=plan).log_likelihood
        largest = largest_log_likelihood(model)
        return jnp.where(is_above(value, largest), -jnp.inf, value)

    def filter(self, model: StateSpaceModel) -> ParticleResult:
        """The particles behind `log_likelihood`: of the same random numbers."""
        return jax.jit(lambda: self._filter(model))()

    def _run_keys(self, key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        return key, jax.random.fold_in(key, 1) if key.ndim == 0 else key


class RegimeEstimator(RaoBlackwell):
    """A filter over regimes inside an engine, which takes its value for what it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        return self._run(model).log_likelihood


def estimated_log_density(
    model: Callable[..., Any], method: AbstractFilter, z: Any, args: Any, kwargs: Any
) -> Float[Array, ""]:
    """Log density of unconstrained values, the path integrated out; minus infinity for NaN."""
    value = -potential_energy(marginalize(model, method=method), args, kwargs, z)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


class Contestant(NamedTuple):
    """One candidate of a race.

    Attributes:
        name: of the proposal.
        milliseconds: of one filter.
        sd: standard deviation of its log likelihood, the largest among the central points.
        shortfall: largest number of nats by which its likelihood is below the best one, at points
            that hold mass.
        kept: whether it is among those that miss nothing.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.Contestant("bootstrap", 2.0, 0.8, 0.1, True).name
        'bootstrap'
    """

    name: str
    milliseconds: float
    sd: float
    shortfall: float
    kept: bool


class ProposalRace(NamedTuple):
    """How candidates did: `print` shows the table.

    Attributes:
        contestants: the candidates.
        chosen: name of the one taken.
        num_particles: particles of each filter in the race.
        points: unconstrained values at which they ran, `(J, D)`.
        log_density: the best estimate of the log posterior density there, `(J,)`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.ProposalRace._fields[:2]
        ('contestants', 'chosen')
    """

    contestants: tuple[Contestant, ...]
    chosen: str
    num_particles: int
    points: Float[np.ndarray, "J D"]
    log_density: Float[np.ndarray, " J"]

    def __str__(self) -> str:
        head = f"{'proposal':<12}{'ms':>9}{'sd':>9}{'nats short':>12}"
        head = f"{head}  ({self.num_particles} particles)"
        rows = [
            f"{c.name:<12}{c.milliseconds:>9.2f}{c.sd:>9.2f}{c.shortfall:>12.2f}  "
            + ("taken" if c.name == self.chosen else "" if c.kept else "dropped")
            for c in self.contestants
        ]
        return "\n".join([head, *rows])

    @property
    def best_point(self) -> Float[np.ndarray, " D"]:
        """The point of the highest estimated density."""
        return self.points[int(np.argmax(self.log_density))]

    @property
    def central(self) -> Float[np.ndarray, "K D"]:
        """Those points of the better half that are at most 4 nats below the best."""
        return self.points[_central(self.log_density)]


def _central(log_density: Float[np.ndarray, " J"]) -> Int[np.ndarray, " K"]:
    """Index of the central points, the best one first."""
    order = np.argsort(-log_density)[: max(1, log_density.size // 2)]
    near = log_density[order] >= log_density[order[0]] - _CENTRAL
    near[0] = True  # of minus infinity too
    return order[near]


def spread_points(start: Start, key: PRNGKeyArray, count: int) -> Float[np.ndarray, "J D"]:
    """The start itself and draws of a Student law with 5 degrees of freedom about it."""
    flat, _ = ravel_pytree(start.z)
    normal_key, scale_key = jax.random.split(key)
    z = jax.random.normal(normal_key, (count - 1, flat.size), flat.dtype)
    squares = jax.random.normal(scale_key, (count - 1, _FREEDOM), flat.dtype) ** 2
    chi2 = jnp.sum(squares, axis=1, keepdims=True)  # quicker to compile than a gamma law
    draws = flat[None] + _WIDTH * (z * jnp.sqrt(_FREEDOM / chi2)) @ jnp.asarray(start.factor).T
    return np.concatenate([np.asarray(flat)[None], np.asarray(draws)])


class _AllLinear(AbstractFilter):
    """Notes whether every path of a model is linear and normal."""

    found: list[bool]

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        self.found.append(has_exact(model) or is_linear_gaussian(model))
        return jnp.zeros((), model.init_mean.dtype)


def guide_is_exact(model: Callable[..., Any], z: Any, args: Any, kwargs: Any) -> bool:
    """Whether guided particles are exact for a model at any parameters, found by tracing it."""
    found: list[bool] = []
    jax.eval_shape(lambda z: estimated_log_density(model, _AllLinear(found), z, args, kwargs), z)
    return bool(found) and all(found)


def regimes_are_linear(model: Callable[..., Any], z: Any, args: Any, kwargs: Any) -> bool:
    """Whether all paths follow switching SDEs, linear and normal given the regimes, by tracing."""
    method = RegimeEstimator(1)
    try:
        jax.eval_shape(lambda z: estimated_log_density(model, method, z, args, kwargs), z)
    except (ValueError, TypeError):
        return False
    return True


def race_proposals(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    start: Start,
    key: PRNGKeyArray,
    *,
    names: Sequence[str],
    num_particles: int,
    options: dict[str, Any],
) -> ProposalRace:
    """Run each proposal several times at several points about a start.

    With few particles a candidate may differ by dozens of nats from run to run, and which one wins
    is chance. Where that is so even for the steadiest of those with bounded weights, all run again
    with eight times as many.

    A candidate is dropped whose log mean likelihood is below the best by more than three nats and
    three of its own standard deviations at any point that holds mass. Of the rest the one with the
    least variance times milliseconds is taken, a proposal without bounded weights only where it is
    better by a factor of 4.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        start: where the points are, unconstrained.
        key: random key.
        names: of the proposals.
        num_particles: particles of each filter in the first race.
        options: other options of `filters.Particle`.
    """
    _, back = ravel_pytree(start.z)
    point_key, run_key = jax.random.split(key)
    points = spread_points(start, point_key, NUM_POINTS)
    at = jax.vmap(back)(jnp.asarray(points))
    while True:
        keys = jax.random.split(jax.random.fold_in(run_key, num_particles), NUM_RUNS)
        runs = _run_all(model, args, kwargs, at, keys, names, num_particles, options)
        found = judge(*runs, points, num_particles)
        if _tells(found) or num_particles * _MORE > _MOST_RACED:
            return found
        num_particles *= _MORE


def _tells(found: ProposalRace) -> bool:
    """Whether the levels of the race are those of the likelihood, and not chance."""
    sds = [c.sd for c in found.contestants if c.name in _BOUNDED]
    return not sds or min(sds) <= _TELLING_SD


def _run_all(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    at: dict[str, Array],
    keys: PRNGKeyArray,
    names: Sequence[str],
    num_particles: int,
    options: dict[str, Any],
) -> tuple[tuple[str, ...], Float[np.ndarray, "C J R"], Float[np.ndarray, " C"]]:
    """Names of those that suit the model, their log densities, and milliseconds of one filter."""
    raced: dict[str, tuple[Float[np.ndarray, "J R"], float]] = {}
    refused: ValueError | None = None
    for name in names:
        for proposal in _forms(name, names):
            method = LikelihoodEstimator(num_particles, proposal=proposal, **options)
            try:
                raced[name] = _timed(model, args, kwargs, method, at, keys)
                break
            except ValueError as error:
                # Not for this model: for its scheme, or for components seen exactly.
                refused = refused or error
    if not raced and refused is not None:
        raise refused
    values, times = zip(*raced.values(), strict=True)
    return tuple(raced), np.array(values), np.array(times)


def _forms(name: str, names: Sequence[str]) -> tuple[str | Proposal, ...]:
    """How a proposal runs in a race: what is compiled for one of these serves the other too."""
    if name == "guided" and "defensive" in names:
        return Defensive(share=0.0), name  # the second where a model takes guided ones alone
    return (name,)


def _timed(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    method: LikelihoodEstimator,
    points: dict[str, Array],
    keys: PRNGKeyArray,
) -> tuple[Float[np.ndarray, "J R"], float]:
    """Log densities at points, and the milliseconds of one filter, compilation left out."""

    def run(arguments: Any) -> Any:
        estimate = partial(_estimates, model, arguments, method, points, keys)
        jax.block_until_ready(estimate())
        before = time.process_time()
        found = jax.block_until_ready(estimate())
        return found, 1e3 * (time.process_time() - before) / (NUM_POINTS * NUM_RUNS)

    found, milliseconds = with_data_as_arguments(model, args, kwargs, run)
    return np.asarray(found, np.float64), milliseconds


@entry_point
def _estimates(
    model: Callable[..., Any],
    arguments: Any,
    method: LikelihoodEstimator,
    points: dict[str, Array],
    keys: PRNGKeyArray,
) -> Float[Array, "J R"]:
    """Log densities at points, each by several filters."""
    args, kwargs = released(arguments)

    def one(point: dict[str, Array], key: PRNGKeyArray) -> Array:
        return estimated_log_density(model, method.with_key(key), point, args, kwargs)

    return lax.map(lambda p: lax.map(lambda k: one(p, k), keys), points)


def judge(
    names: tuple[str, ...],
    values: Float[np.ndarray, "C J R"],
    milliseconds: Float[np.ndarray, " C"],
    points: Float[np.ndarray, "J D"],
    num_particles: int,
) -> ProposalRace:
    """Choose by the runs of each candidate at each point."""
    with np.errstate(all="ignore"):
        top = np.max(values, axis=2, keepdims=True)
        level = np.where(np.isfinite(top), top, 0.0)
        means = np.log(np.mean(np.exp(values - level), axis=2)) + level[..., 0]
        sds = np.std(values, axis=2, ddof=1)
    sds = np.where(np.isfinite(sds), sds, np.inf)
    best = np.max(means, axis=0)
    highest = np.max(best)
    mass = (best > highest - _MASS) | ~np.isfinite(highest)
    with np.errstate(all="ignore"):
        short = np.where(mass, best - means, 0.0)
    short = np.where(np.isnan(short), np.inf, short)
    lost = (short > 3.0 + 3.0 * sds) | np.isposinf(short)
    kept = ~np.any(lost & mass, axis=1)
    kept |= ~np.any(kept)
    central = _central(best)
    worst = np.max(sds[:, central], axis=1)
    # By how much a number of runs of the same total time would leave.
    typical = np.median(sds[:, central], axis=1)
    trust = np.array([1.0 if name in _BOUNDED else _DOUBT for name in names])
    cost = np.where(kept, np.maximum(typical, 1e-3) ** 2 * milliseconds * trust, np.inf)
    if not np.any(np.isfinite(cost)):
        cost = np.max(short, axis=1)
    chosen = names[int(np.argmin(cost))]
    rows = tuple(
        Contestant(n, float(t), float(w), float(s.max()), bool(k))
        for n, t, w, s, k in zip(names, milliseconds, worst, short, kept, strict=True)
    )
    return ProposalRace(rows, chosen, num_particles, points, best)


def fingerprint(args: Any, kwargs: Any) -> Any:
    """What tells data apart: shapes, types and contents of arrays; None where they are traced."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    parts: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, np.ndarray | jax.Array) and not jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            a = np.asarray(leaf)
            parts.append((a.shape, a.dtype.str, hashlib.sha256(a.tobytes()).hexdigest()))
        else:
            parts.append(repr(leaf))
    return str(tree), tuple(parts)
