"""Users' own filters and path laws against exact densities of linear models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import condition, seed, substitute, trace
from numpyro.infer.util import log_density

from numpyro_sde.guides import AutoPathGuide
from numpyro_sde.guides.path_laws import PathLaw
from numpyro_sde.handlers import marginalize
from numpyro_sde.states.smoothing import smooth
from numpyro_sde.statespace.model import AbstractFilter
from numpyro_sde.testing.compare import assert_true
from numpyro_sde.testing.ways import Way, chosen

# Values of the parameter at which densities are compared.
_LEVELS = (0.4, -1.0)


def check_filter(
    method: AbstractFilter,
    *,
    tolerance: float = 1e-6,
    ways: Sequence[str] | None = None,
    num_runs: int = 100,
    num_draws: int = 2000,
    rng_key: PRNGKeyArray | None = None,
) -> None:
    """Check a filter against exact densities, on every way in which a path may be observed.

    The models are linear and normal, of three times, scalar and with two components: data at all
    times, missing in part and altogether, in whole numbers, at some times, at repeated times, of
    two instruments, of several series on one clock and on their own. Truth is the closed integral
    of the joint density, in NumPy. For each way, in float64:

    - the log likelihood under `handlers.marginalize`, at two parameter values, and its gradient;
      of a filter with random numbers (`random_key` is not None) the mean of likelihood over truth,
      which must be 1 within 4 Monte Carlo standard errors;
    - the terms `increments`, which must add up to it;
    - means and covariances of the paths that `nsde.smooth` draws, within 5 standard errors.

    Not for filters that are wrong on purpose for linear models too (inflated, localised): give a
    `tolerance` that covers what they change.

    Args:
        method: the filter.
        tolerance: how far the log likelihood of a filter without random numbers may be off, and
            its gradient 100 times as far.
        ways: names of the ways to check; None for all.
        num_runs: runs of a filter with random numbers.
        num_draws: paths drawn; 0 leaves that check out.
        rng_key: random key; None is `jax.random.key(0)`.

    Raises:
        AssertionError: naming the way, what came and what is right.
        TypeError: `method` is no filter.
        ValueError: an unknown way.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.testing import check_filter
        >>> class Deaf(nsde.filters.ExtendedKalman):
        ...     "Takes no notice of the last datum."
        ...     def log_likelihood(self, model):
        ...         return self.increments(model)[:-1].sum()
        >>> check_filter(nsde.filters.ExtendedKalman(), ways=["plain"], num_draws=100)
        >>> check_filter(Deaf(), ways=["plain"], num_draws=0)
        Traceback (most recent call last):
            ...
        AssertionError: plain: log likelihood at b = 0.4 must be -3.286151, got -2.871607
    """
    if not isinstance(method, AbstractFilter):
        raise TypeError(f"method must be one of nsde.filters, got {method!r}")
    key = jax.random.key(0) if rng_key is None else rng_key
    with jax.enable_x64(True):
        for way in chosen(ways):
            run_key, draw_key = jax.random.split(key)
            if method.random_key is None:
                _check_density(way, method, tolerance)
            else:
                _check_unbiased(way, method, num_runs, run_key)
            if num_draws and way.truth(_LEVELS[0]).free().size:
                _check_draws(way, method, num_draws, draw_key)


def _sites(way: Way, method: AbstractFilter, b: Any, key: Any = 0) -> dict[str, Any]:
    """Observation sites of the model with its path integrated out."""
    model = condition(marginalize(way.model, method=method), {"b": b})
    # The seed decides a filter's random numbers.
    sites = trace(seed(model, key)).get_trace(*way.args)
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and site["is_observed"] and name != "b"
    }


def _log_likelihood(way: Way, method: AbstractFilter, b: Any, key: Any = 0) -> Array:
    sites = _sites(way, method, b, key).values()
    return jnp.asarray(sum(jnp.sum(site["fn"].log_prob(site["value"])) for site in sites))


def _check_density(way: Way, method: AbstractFilter, tolerance: float) -> None:
    def terms(b: Any) -> Any:
        sites = _sites(way, method, b).values()
        return sum(jnp.sum(site["fn"].log_prob_pointwise(site["value"])) for site in sites)

    both = jax.jit(jax.value_and_grad(lambda b: _log_likelihood(way, method, b)))
    for b in _LEVELS:
        got, slope = both(b)
        _assert_near(way, f"log likelihood at b = {b}", got, way.evidence(b), tolerance)
        _assert_near(way, f"its derivative at b = {b}", slope, way.score(b), 100 * tolerance)
    got, total = both(_LEVELS[0])[0], jax.jit(terms)(_LEVELS[0])
    _assert_near(way, "sum of the terms log_prob_pointwise", total, got, 1e-9 * (1 + abs(got)))


def _check_unbiased(way: Way, method: AbstractFilter, num_runs: int, key: PRNGKeyArray) -> None:
    b = _LEVELS[0]

    def run(key: PRNGKeyArray) -> Array:
        return _log_likelihood(way, method, b, key)

    keys = jax.random.split(key, num_runs)
    got = np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys))(keys))
    ratio = np.exp(got - way.evidence(b))
    error = ratio.std(ddof=1) / np.sqrt(num_runs)
    what = f"mean of likelihood / truth at b = {b}, standard error {error:.2g},"
    _assert_near(way, what, ratio.mean(), 1.0, 4 * error + 1e-8)


def _check_draws(way: Way, method: AbstractFilter, num_draws: int, key: PRNGKeyArray) -> None:
    b = _LEVELS[0]
    samples = {"b": np.full(num_draws, b)}
    drawn = smooth(way.model, samples, *way.args, method=method, rng_key=key, batch_size=num_draws)[
        "x"
    ]
    joint = way.truth(b)
    draws = np.asarray(drawn).reshape(num_draws, -1)[:, joint.free()]
    _assert_moments(way, draws, *joint.moments())


def _assert_moments(way: Way, draws: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> None:
    count, variance = len(draws), np.diag(cov)
    error = np.sqrt(variance / count)
    _assert_near(way, "mean of the paths drawn", draws.mean(0), mean, 5 * error)
    error = np.sqrt((np.outer(variance, variance) + cov**2) / count)
    _assert_near(way, "covariance of the paths drawn", np.cov(draws.T), cov, 5 * error)


def _assert_near(way: Way, what: str, got: Any, want: Any, tolerance: Any) -> None:
    got, want = np.asarray(got, float), np.asarray(want, float)
    near = got.shape == want.shape and bool(np.all(np.abs(got - want) <= tolerance))
    right = np.array2string(want, precision=6, floatmode="fixed" if want.ndim == 0 else "maxprec")
    came = np.array2string(got, precision=6, floatmode="fixed" if got.ndim == 0 else "maxprec")
    assert_true(near, f"{way.name}: {what} must be {right}", came)


def check_path_law(
    law: PathLaw,
    *,
    ways: Sequence[str] | None = None,
    num_draws: int = 1000,
    rng_key: PRNGKeyArray | None = None,
) -> None:
    """Check that draws of a path law for `AutoPathGuide` follow its density.

    Whatever law a guide has, the mean of joint density over its own density is the evidence, if
    draws and density agree. On the linear models of :func:`check_filter` the evidence is known; the
    mean must be that within 4 Monte Carlo standard errors. Parameters of the law are as they begin.
    Weights of a law with thinner tails than the posterior have no variance: for laws that begin
    wide enough.

    Args:
        law: the path law.
        ways: names of the ways to check; None for all that have data.
        num_draws: paths drawn for each way.
        rng_key: random key; None is `jax.random.key(0)`.

    Raises:
        AssertionError: naming the way, what came and what is right.
        TypeError: `law` is no path law.
        ValueError: an unknown way.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.testing import check_path_law
        >>> check_path_law(nsde.guides.GaussianMarkovPath(), ways=["plain"])
    """
    if not isinstance(law, PathLaw):
        raise TypeError(f"law must be a guides.PathLaw, got {law!r}")
    key = jax.random.key(0) if rng_key is None else rng_key
    with jax.enable_x64(True):
        for way in chosen(ways):
            if way.refusal is None:
                _check_weights(way, law, num_draws, key)


def _check_weights(way: Way, law: PathLaw, num_draws: int, key: PRNGKeyArray) -> None:
    b = _LEVELS[0]
    guide = AutoPathGuide(condition(way.model, {"b": b}), path=law)
    sites = trace(seed(guide, 0)).get_trace(*way.args)
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
        recorded = trace(substitute(seed(guide, key), params)).get_trace(*way.args)
        x: Any = recorded["x"]["value"]
        return x, log_density(substitute(guide, params), way.args, {}, {"x": x})[0]

    x, log_q = jax.jit(jax.vmap(draw))(jax.random.split(key, num_draws))
    joint = way.truth(b)
    log_p = np.array([joint.at(value) for value in np.asarray(x)])
    ratio = np.exp(log_p - np.asarray(log_q) - way.evidence(b))
    error = ratio.std(ddof=1) / np.sqrt(num_draws)
    what = f"mean of weights / evidence, standard error {error:.2g},"
    _assert_near(way, what, ratio.mean(), 1.0, 4 * error + 1e-7)
