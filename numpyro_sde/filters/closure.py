"""Does a Gaussian closure of the moment equations hold for this model?

A closed pair of moment equations always has a solution; that it is near the truth is another
matter. For small copy numbers it diverges, for bistable systems it has several stationary
answers (Schnoerr, Sanguinetti and Grima 2014, "Validity conditions for moment closure
approximations in stochastic chemical kinetics"). The check compares it with a richer
quadrature and with simulated paths, from the model's start and from displaced ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.linear.balance import fastest_rate
from numpyro_sde.linear.small import diagonal, matmul, psd_factor, transpose
from numpyro_sde.schemes.moment_closure import MomentClosure
from numpyro_sde.statespace.checks import check_count
from numpyro_sde.statespace.model import FilterResult, StateSpaceModel

_LEAST_SUBSTEPS, _MOST_SUBSTEPS = 10, 1000
_LARGEST = 0.05  # of a step times the fastest rate
_FINE = {1: 20, 2: 12, 3: 7}
_SIDES = (("below", -1.0), ("above", 1.0))


class ClosureReport(NamedTuple):
    """How far a Gaussian closure is from simulated paths, start by start.

    Attributes:
        ok: whether no reason was found to distrust it.
        reasons: what was found, in words.
        mean_gap: per start, the largest difference of a predicted mean from the simulated one,
            in standard deviations of the simulation, shape `(S,)`.
        variance_ratio: per start, the predicted variance over the simulated one where they
            differ most, shape `(S,)`.
        order_gap: per start, the largest difference of a mean or standard deviation from those
            of a finer quadrature rule, in standard deviations, shape `(S,)`; NaN where there
            is no finer rule.
        skewness: per start, the largest absolute skewness of the simulated states.
        kurtosis: per start, their largest absolute excess kurtosis.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.filters import ClosureReport
        >>> zero = np.zeros(3)
        >>> report = ClosureReport(True, (), zero, zero + 1.0, zero, zero, zero)
        >>> report.ok, report.reasons
        (True, ())
    """

    ok: bool
    reasons: tuple[str, ...]
    mean_gap: Float[np.ndarray, " S"]
    variance_ratio: Float[np.ndarray, " S"]
    order_gap: Float[np.ndarray, " S"]
    skewness: Float[np.ndarray, " S"]
    kurtosis: Float[np.ndarray, " S"]


def closure_check(
    model: StateSpaceModel | Any,
    method: MomentMatching | None = None,
    *,
    num_paths: int = 4000,
    substeps: int | None = None,
    starts: Any = (),
    mean_tolerance: float = 0.25,
    variance_tolerance: float = 0.5,
    seed: int = 0,
) -> ClosureReport:
    """Compare a Gaussian closure with simulation and with a finer quadrature.

    The first start is the model as it stands: after each observation the simulated paths are
    redrawn from the filter's belief, so that the closure is tested over the gaps in which the
    filter uses it. Two more run without data, from fixed states two standard deviations
    to either side of the mean that the closure predicts for the last time.

    A reaction network under `laws.MomentClosure()` is simulated by its jump law, exactly, from
    counts. Reported are then also moments that no law has (a negative mean or variance, explosion),
    and a closure whose end depends on the start where that of the counts does not, as in bistable
    networks.

    Args:
        model: a path with parameter values and no batch (not under `jit`), an `SDEPath` or
            `ReactionPath`; or a path and its data, `nsde.state_space_model(path, emission, obs)`.
        method: the filter to check; None for `MomentMatching()`.
        num_paths: simulated paths from each start.
        substeps: Euler steps of the simulation for each grid step; by default 10, or as many as
            keep the step times the drift's fastest rate along the closure's path below 0.05, to
            1,000.
        starts: further states to start from without data, `(S, d)`: far apart, they show whether
            the closure has several answers.
        mean_tolerance: allowed error of a mean, in standard deviations.
        variance_tolerance: allowed relative error of a variance.
        seed: seed of the simulation.

    Returns:
        The report; `report.ok` is False where something is wrong.

    Raises:
        ValueError: a count below 1 or a tolerance that is not positive.
        TypeError: a count that is no integer; neither a path nor a model.

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> wells = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=0.7)
        >>> path = nsde.SDEPath(wells, np.linspace(0.0, 5.0, 26), dist.Normal(0.0, 0.1))
        >>> report = nsde.filters.closure_check(path, num_paths=500)
        >>> report.ok  # paths part into two wells, which one Gaussian does not
        False
        >>> bool(report.variance_ratio[0] < 0.6)
        True
    """
    method = MomentMatching() if method is None else method
    model = _model_of(model)
    check_count("num_paths", num_paths, least=100)
    check_count("substeps", 1 if substeps is None else substeps)
    for name, value in (
        ("mean_tolerance", mean_tolerance),
        ("variance_tolerance", variance_tolerance),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    key = jax.random.key(seed)
    model = _from_counts(model, model.init_mean, model.init_cov)
    substeps = _enough_substeps(model, method) if substeps is None else substeps
    run = _comparison(model, method, num_paths, substeps)
    free = model._replace(instruments=())
    run_free = _comparison(free, method, num_paths, substeps) if model.instruments else run
    gap, *_ = run(model.init_mean, model.init_cov, key)
    gaps, names = [gap], ["the model's start"]
    _, mean, cov, truth = run_free(model.init_mean, model.init_cov, key)
    ends, truths, further = [mean], [truth], []
    spread = 2.0 * jnp.sqrt(diagonal(cov))
    finite = bool(jnp.all(jnp.isfinite(mean)) & jnp.all(jnp.isfinite(spread)))
    if finite:
        further += [(f"a start two s.d. {n}", mean + s * spread) for n, s in _SIDES]
    further += [
        (f"the start {np.asarray(x).tolist()}", x)
        for x in jnp.asarray(starts, mean.dtype).reshape(-1, model.dim)
    ]
    for name, state in further:
        start = _from_counts(model, state, jnp.zeros_like(cov))
        gap, end, _, truth = run_free(start.init_mean, start.init_cov, key)
        gaps.append(gap)
        ends.append(end)
        truths.append(truth)
        names.append(name)
    gaps = [_Gap(*map(float, gap)) for gap in gaps]
    reasons = [
        reason
        for name, gap in zip(names, gaps, strict=True)
        for reason in _reasons(name, gap, mean_tolerance, variance_tolerance)
    ]
    if not finite:
        reasons.append(
            "without data the moments diverge, or a mean or variance becomes negative"
            if _is_network(model)
            else "without data the moments diverge"
        )
    reasons += _starts_matter(jnp.stack(ends), jnp.stack(truths), mean_tolerance)
    columns = [np.array([gap[i] for gap in gaps]) for i in range(5)]
    return ClosureReport(not reasons, tuple(reasons), *columns)


def _model_of(model: Any) -> StateSpaceModel:
    """The model that is checked: itself, or that of a path."""
    if isinstance(model, StateSpaceModel):
        return model
    build = getattr(model, "state_space_model", None)
    if build is None:
        raise TypeError(
            "closure_check takes an SDEPath, a ReactionPath or what nsde.state_space_model made, "
            f"got {type(model).__name__}"
        )
    return build()


def _is_network(model: StateSpaceModel) -> bool:
    """Whether the moments are those of a reaction network's counts."""
    return isinstance(model.scheme, MomentClosure)


def _from_counts(model: StateSpaceModel, mean: Array, cov: Array) -> StateSpaceModel:
    """The model from a start, which of a network is made of whole numbers where it is fixed."""
    if _is_network(model) and not bool(jnp.any(cov)):
        mean = jnp.maximum(jnp.round(mean), 0.0)
    return model._replace(init_mean=mean, init_cov=cov)


def _enough_substeps(model: StateSpaceModel, method: MomentMatching) -> int:
    """Euler steps in a grid step that do not blame the closure for an error of their own.

    A step h changes the variance of a rate r by about `r h / 2` of it.
    """
    if _is_network(model):
        return _LEAST_SUBSTEPS

    @jax.jit
    def products(mean: Array, cov: Array) -> Array:
        free = model._replace(instruments=(), init_mean=mean, init_cov=cov)
        result = method.filter(free)
        sd = jnp.sqrt(diagonal(result.predicted_cov))
        places = jnp.stack([result.predicted_mean + side * sd for side in (-2.0, 0.0, 2.0)])

        def at(inputs: Any, x: Array) -> Array:
            t, dt, cache = inputs
            drift = partial(model.in_step(t, cache).drift, t)
            return dt * fastest_rate(jax.jacfwd(drift)(x))

        of_times = jax.vmap(at, in_axes=(0, 0))
        return jax.vmap(lambda x: of_times(model.step_inputs(), x))(places[:, :-1])

    product = float(jnp.max(products(model.init_mean, model.init_cov)))
    if not np.isfinite(product):  # moments that diverge are found by the comparison
        return _LEAST_SUBSTEPS
    return int(np.clip(np.ceil(product / _LARGEST), _LEAST_SUBSTEPS, _MOST_SUBSTEPS))


def _starts_matter(ends: Array, truths: Array, tolerance: float) -> list[str]:
    """Whether the last means are further apart, start by start, than those of the simulations."""
    sd = jnp.sqrt(jnp.maximum(jnp.max(truths[:, 1], axis=0), jnp.finfo(ends.dtype).tiny))
    apart = [jnp.ptp(a, axis=0) / sd for a in (ends, truths[:, 0])]
    excess = float(jnp.max(apart[0] - apart[1]))
    if not excess > 2.0 * tolerance:
        return []
    return [
        f"the closure's last mean depends on the start, by {excess:.2g} standard deviations more "
        "than the simulated one"
    ]


def _finer(method: MomentMatching, model: StateSpaceModel) -> MomentMatching | None:
    d = model.dim
    if d not in _FINE or _is_network(model):  # whose closure takes no quadrature
        return None
    return MomentMatching("gauss_hermite", order=_FINE[d], substeps=2 * method.substeps)


class _Gap(NamedTuple):
    mean: Any
    ratio: Any
    order: Any
    skewness: Any
    kurtosis: Any


def _comparison(
    model: StateSpaceModel, method: MomentMatching, num_paths: int, substeps: int
) -> Callable[[Array, Array, PRNGKeyArray], tuple[_Gap, Array, Array, Array]]:
    """Compile the comparison from a start.

    It also gives the last predicted mean and covariance, and the last simulated mean and variance.
    """
    fine = _finer(method, model)

    @jax.jit
    def run(mean: Array, cov: Array, key: PRNGKeyArray) -> tuple[_Gap, Array, Array, Array]:
        case = model._replace(init_mean=mean, init_cov=cov)
        result = method.filter(case)
        finer = None if fine is None else fine.filter(case)
        simulated = _simulate(case, result, key, num_paths, substeps)
        gap = _compare(result, finer, simulated)
        last = jnp.stack([simulated[0][-1], simulated[1][-1]])
        return gap, result.predicted_mean[-1], result.predicted_cov[-1], last

    return run


def _compare(result: FilterResult, finer: FilterResult | None, simulated: Any) -> _Gap:
    mean, var, skewness, kurtosis = simulated
    predicted = result.predicted_mean[1:]
    predicted_var = diagonal(result.predicted_cov[1:])
    # A component that the noise has not reached has no spread to measure errors in.
    floor = 1e-6 * jnp.maximum(jnp.max(var, axis=0, keepdims=True), jnp.finfo(var.dtype).tiny)
    sd = jnp.sqrt(jnp.maximum(var, floor))
    ratio = jnp.where(var > floor, predicted_var / jnp.maximum(var, floor), 1.0)
    worst = jnp.argmax(jnp.abs(jnp.log(ratio)))
    order_gap = jnp.asarray(jnp.nan)
    if finer is not None:
        means = jnp.abs(predicted - finer.predicted_mean[1:]) / sd
        other = diagonal(finer.predicted_cov[1:])
        spreads = jnp.abs(jnp.sqrt(predicted_var) - jnp.sqrt(other)) / sd
        order_gap = jnp.maximum(jnp.max(means), jnp.max(spreads))
    return _Gap(
        jnp.max(jnp.abs(predicted - mean) / sd),
        jnp.ravel(ratio)[worst],
        order_gap,
        jnp.max(jnp.abs(skewness)),
        jnp.max(jnp.abs(kurtosis)),
    )


def _simulate(
    model: StateSpaceModel,
    result: FilterResult,
    key: PRNGKeyArray,
    num_paths: int,
    substeps: int,
) -> tuple[Array, Array, Array, Array]:
    """Moments of simulated paths before each grid time's observation.

    Of Euler-Maruyama paths, or of the exact jumps of a network.
    """
    observed = jnp.zeros(model.num_times, bool)
    for instrument in model.instruments:
        observed = observed | jnp.any(jnp.asarray(instrument.present), axis=1)

    def draw(key: PRNGKeyArray, mean: Array, cov: Array) -> Array:
        z = jax.random.normal(key, (num_paths, model.dim), mean.dtype)
        x = mean[None] + matmul(z, transpose(psd_factor(cov)))
        return jnp.maximum(jnp.round(x), 0.0) if _is_network(model) else x

    def step(x: Array, inputs: Any) -> tuple[Array, Any]:
        key, (t, dt, cache), redraw, mean, cov = inputs
        h = dt / substeps
        inside = model.in_step(t, cache)
        x = jax.vmap(lambda x: model.open_step(x, cache))(x)

        def small(x: Array, sub: Any) -> tuple[Array, None]:
            i, key = sub
            s = t + i * h
            L = jax.vmap(lambda x: inside.factor(s, x))(x)
            z = jax.random.normal(key, (num_paths, L.shape[-1]), x.dtype)
            drift = jax.vmap(lambda x: inside.drift(s, x))(x)
            return x + h * drift + jnp.sqrt(h) * jnp.einsum("nij,nj->ni", L, z), None

        keys = jax.random.split(key, substeps + 1)
        if _is_network(model):
            own = jax.random.split(keys[-1], num_paths)
            x = jax.vmap(lambda x, key: model.scheme.draw(model.sde, key, t, dt, x))(x, own)
        else:
            x, _ = lax.scan(small, x, (jnp.arange(substeps), keys[1:]))
        moments = _shape(x)
        return jnp.where(redraw, draw(keys[0], mean, cov), x), moments

    key, start_key = jax.random.split(key)
    keys = jax.random.split(key, model.num_times - 1)
    inputs = (keys, model.step_inputs(), observed[1:], result.mean[1:], result.cov[1:])
    start = draw(start_key, result.mean[0], result.cov[0])
    return lax.scan(step, start, inputs)[1]


def _shape(x: Array) -> tuple[Array, Array, Array, Array]:
    """Mean, variance, skewness and excess kurtosis of each component."""
    mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    z = (x - mean[None]) / jnp.sqrt(jnp.where(var > 0, var, 1.0))[None]
    kurtosis = jnp.where(var > 0, jnp.mean(z**4, axis=0) - 3.0, 0.0)
    return mean, var, jnp.mean(z**3, axis=0), kurtosis


def _reasons(name: str, gap: _Gap, mean_tolerance: float, variance_tolerance: float) -> list[str]:
    mean_gap, ratio, order_gap, _, _ = gap
    if not np.all(np.isfinite([mean_gap, ratio])):
        return [f"from {name} the moments diverge"]
    found = []
    if mean_gap > mean_tolerance:
        found.append(f"from {name} a mean is off by {mean_gap:.2g} standard deviations")
    if abs(ratio - 1.0) > variance_tolerance:
        found.append(f"from {name} a variance is {ratio:.2g} times the simulated one")
    if order_gap > mean_tolerance:
        found.append(
            f"from {name} a finer quadrature moves the moments by {order_gap:.2g} standard "
            "deviations"
        )
    return found
