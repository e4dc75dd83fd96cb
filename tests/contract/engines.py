"""How each engine is asked for the density of a case; each answers with numbers to compare.

An engine yields `(what, got, want, tolerance)`. Engines with random numbers give their Monte
Carlo error: the tolerance is 4 of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, CORE, FEW, ONE, TWO
from numpyro import handlers
from numpyro.infer.util import log_density
from numpyro.util import identity

import numpyro_sde as nsde
from numpyro_sde.handlers import _ChangePath
from numpyro_sde.testing.quadratic import Quadratic
from numpyro_sde.testing.ways import Way

B = 0.4
ALL = frozenset(case.name for case in CASES)
Answer = tuple[str, Any, Any, Any]
ENGINES: dict[str, Callable[[Way], Iterator[Answer]]] = {}
# Which cases an engine is asked in the default run; the others are marked slow.
CASES_OF: dict[str, Container[str]] = {}


def engine(name, cases=CORE):
    """Add an engine to the table."""

    def add(fn):
        ENGINES[name], CASES_OF[name] = fn, cases
        return fn

    return add


def prior(b=B):
    """Log density of the level's prior, standard normal."""
    return -0.5 * (b**2 + np.log(2 * np.pi))


def at_level(model, b=B):
    """The model with its parameter known: its density is that of path and data, times the prior."""
    return handlers.condition(model, {"b": b})


def some_path(case: Way):
    return np.random.default_rng(3).normal(0.3, 0.7, case.shape)


def latent(case: Way):
    """Engines of latent paths have nothing to do where the path is known."""
    if case.shape is None:
        raise NotAskedError


class NotAskedError(Exception):
    """The question does not arise."""


# ---------------------------------------------------------------- latent paths


@engine("centred", ALL)
def _centred(case):
    x = None if case.shape is None else some_path(case)
    values = {"b": B} if x is None else {"b": B, "x": x}
    got = log_density(handlers.seed(case.outside(case.model), 0), case.args, {}, values)[0]
    truth = case.truth(B)
    yield "log density", got, prior() + case.copies * truth.at(() if x is None else x), 1e-9


def _change_of_variables(case, reparam, known=()):
    """The density of auxiliary sites is that of the path times the Jacobian of the map to it.

    Of a path on which nothing depends, masked out with its data, neither counts.
    """
    model = case.outside(handlers.reparam(at_level(case.model), config={"x": reparam}))
    sites = handlers.trace(handlers.seed(model, 1)).get_trace(*case.args)
    # Data given by `substitute` are values of sites that are not observed.
    names = [
        name
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in ("y", "z")
    ]
    start = {name: sites[name]["value"] for name in names}
    flat, back = jax.flatten_util.ravel_pytree(start)

    def run(flat):
        log_joint, recorded = log_density(handlers.seed(model, 1), case.args, {}, back(flat))
        return recorded["x"]["value"].ravel(), log_joint

    flat = jnp.asarray(np.random.default_rng(4).normal(size=flat.shape))
    # The path of a linear model is affine in its innovations: unit steps give the Jacobian.
    size = 1.0 if isinstance(case.truth(B), Quadratic) else 1e-6
    steps = size * jnp.concatenate([jnp.zeros((1, flat.size)), jnp.eye(flat.size)])
    paths, densities = jax.jit(jax.vmap(run))(flat + steps)
    x, got = paths[0], densities[0]
    assert x.size == case.truth(B).shift.size, f"a path of {x.size} numbers"
    jacobian = np.asarray(paths[1:] - x).T / size
    jacobian = jacobian[np.setdiff1d(case.truth(B).free(), known)]
    log_det = np.linalg.slogdet(jacobian[:, np.abs(jacobian).sum(0) > 1e-12])[1]
    want = prior() + case.copies * (case.truth(B).at(x) + log_det)
    yield "log density of the auxiliary sites", got, want, 1e-7 if size == 1.0 else 1e-5


@engine("whitened", ALL)
def _whitened(case):
    yield from _change_of_variables(case, nsde.reparam.InnovationReparam())


@engine("guided", FEW)
def _guided(case):
    yield from _change_of_variables(case, nsde.reparam.GuidedReparam())


@engine("bridge")
def _bridge(case):
    latent(case)
    points = some_path(case)
    axis = 1 if case.shape == (2, 3) else 0
    np.moveaxis(points, axis, 0)[1] = np.nan
    known = np.flatnonzero(~np.isnan(points.ravel()))
    yield from _change_of_variables(case, nsde.reparam.BridgeReparam(points), known)


# ---------------------------------------------------------------- integrated out


def _marginal(case, method, tolerance, *, derivative=False, change=identity):
    model = case.outside(nsde.handlers.marginalize(change(case.model), method=method))
    if stays_latent(case, model):
        x = some_path(case)
        got = log_density(handlers.seed(model, 0), case.args, {}, {"b": B, "x": x})[0]
        yield "joint log density", got, prior() + case.truth(B).at(x), tolerance
        return

    def density(b):
        return log_density(handlers.seed(model, 0), case.args, {}, {"b": b})[0]

    want = prior() + case.evidence(B)
    if not derivative:
        yield "log density", jax.jit(density)(B), want, tolerance
        return
    got, slope = jax.jit(jax.value_and_grad(density))(B)
    yield "log density", got, want, tolerance
    yield "its derivative", slope, case.score(B) - B, 1e-5 + 10 * tolerance


def stays_latent(case, model):
    """Whether a path that no `observe` sees as it is has been left among the latent sites."""

    def run():
        recorded.update(handlers.trace(handlers.seed(model, 0)).get_trace(*case.args))
        return 0

    recorded: dict[str, Any] = {}
    jax.eval_shape(run)
    return case.leaves_latent and "x" in recorded and not recorded["x"]["is_observed"]


@engine("Kalman", ALL)
def _kalman(case):
    yield from _marginal(case, nsde.filters.Kalman(), 1e-8, derivative=True)


@engine("ExtendedKalman")
def _extended(case):
    yield from _marginal(case, nsde.filters.ExtendedKalman(), 1e-8)


@engine("UnscentedKalman")
def _unscented(case):
    yield from _marginal(case, nsde.filters.UnscentedKalman(), 1e-7)


@engine("MomentMatching", FEW)
def _moment_matching(case):
    yield from _marginal(case, nsde.filters.MomentMatching(), 1e-4)


class _InRegimes(_ChangePath):
    """The same law as an SDE of two hidden regimes that do not differ."""

    def replace(self, name, path):
        if isinstance(path.sde, nsde.SwitchingSDE):  # `do` sends a changed site through again
            return path, np.arange(path.num_times)
        sde, chain = path.sde, nsde.MarkovJumpProcess(np.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        drift, diffusion, params = sde.drift.function, sde.diffusion.function, sde.params
        dims = jax.tree.unflatten(jax.tree.structure(params), sde.parameters.event_dims)
        given = {} if params is None else {"params": params, "event_dims": dims}
        switching = nsde.SwitchingSDE(
            lambda t, x, r, *p: drift(t, x, *p),
            lambda t, x, r, *p: diffusion(t, x, *p),
            chain,
            **given,
        )
        return nsde.SDEPath(switching, path.grid or path.times, path.init), np.arange(
            path.num_times
        )


@engine("RaoBlackwell", ONE)
def _rao_blackwell(case):
    latent(case)
    yield from _marginal(case, nsde.filters.RaoBlackwell(4), 1e-8, change=_InRegimes)


def _estimated(case, method, repeats, key=7, keyed=None):
    keys = jax.random.split(jax.random.key(key), repeats)

    def treated(method):
        return case.outside(nsde.handlers.marginalize(case.model, method=method))

    if stays_latent(case, treated(method)):
        raise NotAskedError

    def density(key):
        # Under a seed handler its key decides, not the filter's own.
        model = treated(method if keyed is None else keyed(key))
        return log_density(handlers.seed(model, key), case.args, {}, {"b": B})[0]

    return np.asarray(jax.jit(lambda keys: jax.lax.map(density, keys))(keys)) - prior()


class _KeyedEnsemble(nsde.filters.EnsembleKalman):
    """On the random numbers of a key that may be traced."""

    key: Any

    def __init__(self, num_members, key=None):
        super().__init__(num_members)
        self.key = key

    def filter(self, model):
        key = jax.random.key(0) if self.key is None else self.key
        return self.filter_with_key(model, key)


@engine("EnsembleKalman", FEW)
def _ensemble(case):
    got = _estimated(case, _KeyedEnsemble(8_000), 10, keyed=partial(_KeyedEnsemble, 8_000))
    error = 4 * got.std(ddof=1) / np.sqrt(got.size)
    # Of logarithms: half the variance is the bias.
    bias = 0.5 * got.var(ddof=1)
    yield "log density", got.mean() + bias, case.evidence(B), error + 1e-8


def _unbiased(case, got):
    ratio = np.exp(got - case.evidence(B))
    error = ratio.std(ddof=1) / np.sqrt(ratio.size)
    yield "estimate / truth", ratio.mean(), 1.0, 4 * error + 1e-8


@engine("Particle bootstrap", FEW)
def _bootstrap(case):
    yield from _unbiased(
        case, _estimated(case, nsde.filters.Particle(100, proposal="bootstrap"), 60)
    )


@engine("Particle guided", ("transformed",))
def _particle(case):
    yield from _unbiased(case, _estimated(case, nsde.filters.Particle(20, proposal="guided"), 20))


# ---------------------------------------------------------------- kernels, smoothers, guides


def _moments_agree(case, draws, what):
    """Means, variances and neighbouring covariances of draws of the path, at 4 standard errors."""
    latent(case)
    draws = np.asarray(draws).reshape(len(draws), -1)
    mean, cov = case.truth(B).moments()
    draws = draws[:, case.truth(B).free()]
    yield f"{what}: mean", draws.mean(0), mean, 4 * np.sqrt(np.diag(cov) / len(draws))
    away = draws - draws.mean(0)
    error = (away[:, :, None] * away[:, None]).std(0) / np.sqrt(len(draws))
    yield f"{what}: covariance", np.cov(draws.T), cov, 4 * error


def _exact_draws(truth, rng, count):
    """Paths given the data."""
    if not isinstance(truth, Quadratic):
        return truth.draw(rng, count)
    mean, cov = truth.moments()
    draws = np.zeros((count, truth.size))
    draws[:, truth.free()] = rng.multivariate_normal(mean, cov, count)
    return draws


@engine("ConditionalSMC", ONE)
def _conditional(case):
    latent(case)
    kernel = nsde.infer.ConditionalSMC(at_level(case.outside(case.model)), num_particles=6)
    count, key = 3000, jax.random.key(5)
    # Its checks are made where it starts.
    jax.eval_shape(lambda k: kernel.init(k, 0, {"x": jnp.zeros(case.shape)}, case.args, {}), key)
    # A sweep leaves the posterior as it is: exact draws stay exact draws.
    exact = _exact_draws(case.truth(B), np.random.default_rng(6), count)
    exact = exact.reshape(count, *case.shape)

    def sweep(x, key):
        state = nsde.infer.ConditionalSMCState({"x": x}, {}, {}, key)
        return kernel.sample(state, case.args, {}).z["x"]

    moved = jax.jit(jax.vmap(sweep))(jnp.asarray(exact), jax.random.split(key, count))
    yield from _moments_agree(case, moved, "after a sweep")


def _exact_pairs(case, count, rng):
    """Draws of level and free numbers of the path: the evidence is quadratic in the level."""
    low, middle, high = (case.evidence(b) for b in (-1.0, 0.0, 1.0))
    precision = 1.0 - (high - 2.0 * middle + low)
    b = rng.normal(0.5 * (high - low) / precision, precision**-0.5, count)
    # The path's mean is affine in the level, its covariance the same at all.
    at_zero, cov = case.truth(0.0).moments()
    means = at_zero + b[:, None] * (case.truth(1.0).moments()[0] - at_zero)
    x = np.zeros((count, case.truth(B).size))
    x[:, case.truth(B).free()] = means + rng.multivariate_normal(np.zeros(len(cov)), cov, count)
    return b, x.reshape(count, *case.shape)


@engine("ParticleGibbs", ())
def _particle_gibbs(case):
    latent(case)
    model = case.outside(case.model)
    kernel = nsde.infer.ParticleGibbs(
        model, 6, proposal="guided", inner_options={"max_tree_depth": 2}
    )
    count, key = 3000, jax.random.key(15)
    start = kernel.init(key, 0, {"b": jnp.zeros(()), "x": jnp.zeros(case.shape)}, case.args, {})
    b, x = _exact_pairs(case, count, np.random.default_rng(16))

    def sweep(b, x, key):
        path, rest, *held = start.block_states
        keys = jax.random.split(key, 4)
        path = path._replace(z={"x": x}, rng_key=keys[0])
        rest = rest._replace(z={"b": b}, rng_key=keys[1])
        # The second move of the parameters, where the path's innovations can be held.
        held = [move._replace(rng_key=keys[3]) for move in held]
        state = start._replace(block_states=(path, rest, *held), rng_key=keys[2])
        return kernel.sample(kernel.refresh(state, case.args, {}), case.args, {}).z

    moved = jax.jit(jax.vmap(sweep))(jnp.asarray(b), x, jax.random.split(key, count))
    exact = np.concatenate([b[:, None], x.reshape(count, -1)], 1)
    moved = np.concatenate([moved["b"][:, None], moved["x"].reshape(count, -1)], 1)
    free = np.concatenate([[0], 1 + case.truth(B).free()])
    # Exact draws stay exact draws: differences of means and of second moments are noise.
    for power in (1, 2):
        change = (moved**power - exact**power)[:, free]
        error = 4 * change.std(0, ddof=1) / np.sqrt(count)
        yield f"change of moment {power} in a sweep", change.mean(0), np.zeros(len(free)), error


@engine("PMMH", ())
def _pmmh(case):
    kernel = nsde.infer.PMMH(case.outside(case.model), num_particles=20)
    kernel.tune(jax.random.key(1), *case.args)
    keys = jax.random.split(jax.random.key(2), 20)
    got = kernel.init(keys, 0, {"b": jnp.full(20, B)}, case.args, {}).log_density
    yield from _unbiased(case, np.asarray(got) - prior())


@engine("score", ())
def _score(case):
    got = nsde.infer.score(
        case.outside(case.model),
        {"b": B},
        *case.args,
        rng_key=jax.random.key(3),
        num_draws=200,
        num_filters=8,
        method=nsde.filters.Particle(64),
    )
    yield "derivative", got.mean["b"], case.score(B), 4 * float(got.standard_error["b"]) + 1e-6


@engine("smooth")
def _smooth(case):
    latent(case)
    draws = {"b": np.full(3000, B)}
    method = nsde.filters.Kalman()
    got = nsde.smooth(
        case.outside(case.model),
        draws,
        *case.args,
        method=method,
        rng_key=jax.random.key(4),
        batch_size=3000,
    )
    yield from _moments_agree(case, got["x"], "draws")


def _path_law(case, law):
    """Weighted by joint over guide, draws of the guide give the evidence without bias."""
    latent(case)
    model = at_level(case.outside(case.model))
    guide = nsde.guides.AutoPathGuide(model, path=law)
    params = {
        name: site["value"]
        for name, site in handlers.trace(handlers.seed(guide, 0)).get_trace(*case.args).items()
        if site["type"] == "param"
    }

    def weight(key):
        held = handlers.substitute(handlers.seed(guide, key), params)
        recorded = handlers.trace(held).get_trace(*case.args)
        x = recorded["x"]["value"]
        log_q = log_density(handlers.substitute(guide, params), case.args, {}, {"x": x})[0]
        return x, log_q

    x, log_q = jax.jit(jax.vmap(weight))(jax.random.split(jax.random.key(8), 1000))
    truth = case.truth(B)
    log_p = np.array([truth.at(value) for value in np.asarray(x)])
    ratio = np.exp(case.copies * log_p - np.asarray(log_q) - case.evidence(B))
    error = ratio.std(ddof=1) / np.sqrt(ratio.size)
    yield "evidence from weights / truth", ratio.mean(), 1.0, 4 * error + 1e-7


@engine("GaussianMarkovPath", TWO)
def _gaussian_markov(case):
    yield from _path_law(case, nsde.guides.GaussianMarkovPath())


@engine("ControlledPath", ONE)
def _controlled(case):
    yield from _path_law(case, nsde.guides.ControlledPath(hidden_dims=(4,)))


@engine("MatchedPath", ())
def _matched_path(case):
    yield from _path_law(case, nsde.guides.MatchedPath())


@engine("ConditionalScorePath", ONE)
def _score_path(case):
    yield from _path_law(case, nsde.guides.ConditionalScorePath(hidden_dims=(4,)))


@engine("to_arviz, integrated out")
def _pointwise(case):
    model = case.outside(nsde.handlers.marginalize(case.model, method=nsde.filters.Kalman()))
    sites = handlers.trace(handlers.seed(at_level(model), 0)).get_trace(*case.args).values()
    if not any(
        site["type"] == "sample" and site["is_observed"] for site in sites if site["name"] != "b"
    ):
        raise NotAskedError  # no data, no terms
    tree = nsde.diagnostics.to_arviz({"b": np.full(2, B)}, model=model, model_args=case.args)
    terms = tree["log_likelihood"].data_vars.values()
    got = sum(float(v.values[0, 0].sum()) for v in terms)
    if case.leaves_latent:
        raise NotAskedError
    yield "sum of pointwise terms", got, case.truth(B).evidence(), 1e-8
