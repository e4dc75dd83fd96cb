"""Chaos with a wrong parameter: what a Gaussian process adds to physics that is nearly right."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from chaotic_systems import SYSTEMS, Scaled, runge_kutta, scaled
from jax import Array
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

# The known part goes along its own flow, which the warning about Euler's steps cannot know.
pytestmark = pytest.mark.filterwarnings(
    "ignore::numpyro_sde.distributions.step_check.CoarseStepWarning"
)

STEP, POINTS, NOISE = 0.005, 2000, 0.1  # turns; sds of the state over the root of a turn
TIMES = np.arange(POINTS) * STEP
SINES = 5


def noisy_path(system, key, inner=10):
    """States of the equation with noise: Runge and Kutta's steps, ten for each that is seen."""
    h = STEP / inner

    def step(x, z):
        return runge_kutta(system.truth, x, h) + NOISE * jnp.sqrt(h) * z, None

    def seen(x, key):
        x, _ = jax.lax.scan(step, x, jax.random.normal(key, (inner, 3)))
        return x, x

    run = jax.jit(lambda x, keys: jax.lax.scan(seen, x, keys)[1])
    rest = run(system.state, jax.random.split(key, POINTS - 1))
    return np.concatenate([np.asarray(system.state)[None], np.asarray(rest)])


def prior_of(system, x):
    """A Gaussian process on a box that goes beyond the data by half their range on each side."""
    if system.doubtful is None:
        x = np.concatenate([np.roll(x, -i, axis=-1) for i in range(3)])
    low, high = x.min(0), x.max(0)
    pad = 0.5 * (high - low)
    return nsde.fields.HSGP(3, list(zip(low - pad, high + pad, strict=True)), SINES)


def mean_velocity(known, x, unknown):
    """Over a step of `known + unknown`, to first order in the unknown.

    Euler's own would be wrong by half a step times the known part's rate of change, which is
    fast. This goes along the known flow, and is linear in the unknown.
    """
    middle = runge_kutta(known, x, 0.5 * STEP)
    carried = jax.jvp(known, (middle,), (unknown(middle),))[1]
    average = (runge_kutta(known, x, STEP) - x) / STEP
    return average + unknown(middle) + 0.5 * STEP * carried


def known_alone(x, system):
    scale = numpyro.sample("scale", dist.LogNormal(-2.0, 1.0))
    sde = nsde.SDE(
        lambda t, x, p: mean_velocity(system.wrong, x, jnp.zeros_like),
        lambda t, x, p: p,
        params=scale,
    )
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=x[0]), obs=x)


def with_unknown(x, system, prior):
    scale = numpyro.sample("scale", dist.LogNormal(-2.0, 1.0))
    f = prior.register("f", amplitude=dist.HalfNormal(5.0), length=dist.InverseGamma(5.0, 10.0))
    sde = nsde.SDE(
        lambda t, x, p: mean_velocity(system.wrong, x, lambda x: system.unknown(p["f"], x)),
        lambda t, x, p: p["scale"],
        params={"f": f, "scale": scale},
    )
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=x[0]), obs=x)


def fit_of(model, x, *args):
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=400, progress_bar=False)
    mcmc.run(jax.random.key(1), x, *args)
    return mcmc


class Learned(NamedTuple):
    """Draws of the unknown part.

    Attributes:
        field: one field, for its functions.
        weights: of all draws, `(draw, sines)`.
        system: where it stands.
    """

    field: nsde.fields.LinearField
    weights: Array
    system: Scaled

    def velocity(self, weights):
        """The three velocities at a state."""
        f = eqx.tree_at(lambda f: f.weights, self.field, weights)
        return lambda x: self.system.unknown(f, x)

    def values(self, weights, at):
        """Of draws at states, `(draw, state, equation)`, where anything is unknown."""
        values = jax.vmap(lambda w: jax.vmap(self.velocity(w))(at))(weights)
        return np.asarray(values)[..., self.system.equations]


def learned(samples, prior, x, system):
    """The weights drawn back."""
    collapsed = nsde.handlers.collapse(with_unknown, "f")
    z = nsde.smooth(collapsed, samples, x, system, prior, rng_key=jax.random.key(2))["f/z"]
    amplitude, length = (jnp.asarray(samples[f"f/{name}"]) for name in ("amplitude", "length"))

    def field(z, amplitude, length):
        return prior.from_weights(z, amplitude=amplitude, length=length)

    weights = jax.vmap(lambda *draw: field(*draw).weights)(z, amplitude, length)
    return Learned(field(z[0], amplitude[0], length[0]), weights, system)


class Scores(NamedTuple):
    """Root mean squares over the data's states, and the share of 90 % bands that hold the truth.

    Attributes:
        wrong: error of the known part alone.
        error: error of the mean; expected: what draws of the posterior are away from it, `spread`
            their standard deviation.
        coverage: share; coverage_sd: standard deviation of that of truths drawn from the posterior.
    """

    wrong: float
    error: float
    expected: float
    spread: float
    coverage: float
    coverage_sd: float


def scores(found, at):
    system = found.system
    truth, wrong = (np.asarray(jax.vmap(f)(at)) for f in (system.truth, system.wrong))
    values = found.values(found.weights, at)
    low, high = np.quantile(values, [0.05, 0.95], axis=0)
    mean = values.mean(0)

    def held(one):
        return np.mean((low <= one) & (one <= high), axis=(-2, -1))

    def away(one):
        return np.sqrt(np.mean((one - mean) ** 2, axis=(-2, -1)))

    missing = (truth - wrong)[:, system.equations]
    return Scores(
        np.sqrt(np.mean(missing**2)),
        away(missing),
        away(values).mean(),
        away(values).std(),
        held(missing),
        held(values).std(),
    )


def valid_times(system, drift, starts, longest=8.0):
    """Lyapunov times for which a forecast without noise stays near the truth's.

    Pathak et al. (2018), "Model-free prediction of large spatiotemporally chaotic systems": until
    the distance is 0.4 of the root mean square of the state.
    """
    h = 2.0 * STEP
    count = int(longest / (system.exponent * h))

    def step(both, _):
        a, b = (runge_kutta(f, x, h) for f, x in zip((system.truth, drift), both, strict=True))
        return (a, b), jnp.linalg.norm(a - b) / jnp.sqrt(3.0)

    def one(start):
        gap = jax.lax.scan(step, (start, start), None, count)[1]
        # A forecast that has run to infinity is far away too.
        return jnp.argmax(jnp.append(~(gap < 0.4), True))

    return np.asarray(jax.jit(jax.vmap(one))(starts)) * h * system.exponent


def test_bands_cover_what_a_wrong_parameter_leaves(x64):
    """Lorenz's equations with rho 24 for 28: hyperparameters given, 200 draws of the weights."""
    system = scaled(SYSTEMS["Lorenz"], steps=50_000)
    x = noisy_path(system, jax.random.key(0))
    given = {"f/amplitude": 4.0, "f/length": 2.0, "scale": NOISE}
    samples = {name: np.full(200, value) for name, value in given.items()}
    got = scores(learned(samples, prior_of(system, x), x, system), jnp.asarray(x[::10]))
    print(got)
    assert got.error < got.expected + 4 * got.spread
    assert got.error < 0.15 * got.wrong
    assert abs(got.coverage - 0.9) < 4 * got.coverage_sd


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_residual_mends_a_wrong_parameter(x64, name):
    """One observed path of ten turns: drift, bands, evidence, and forecasts of the mean drift.

    Errors of averages are those of 40 starts; of bands, what truths drawn from the posterior
    show.
    """
    system = scaled(SYSTEMS[name])
    x = noisy_path(system, jax.random.key(0))
    prior, collapsed = prior_of(system, x), nsde.handlers.collapse(with_unknown, "f")
    alone, both = fit_of(known_alone, x, system), fit_of(collapsed, x, system, prior)
    samples = both.get_samples()
    found = learned({k: v[::2] for k, v in samples.items()}, prior, x, system)
    got = scores(found, jnp.asarray(x[::10]))
    more = found.velocity(found.weights.mean(0))
    starts = jnp.asarray(x[::50])
    mended = valid_times(system, lambda x: system.wrong(x) + more(x), starts)
    wrong = valid_times(system, system.wrong, starts)
    gain = mended - wrong
    gain_error = gain.std(ddof=1) / len(gain) ** 0.5
    without, with_it = (nsde.evidence(fit, rng_key=jax.random.key(3)) for fit in (alone, both))
    evidence = with_it.log_evidence - without.log_evidence
    noise = np.asarray(samples["scale"])
    print(
        f"\n{name}: exponent {system.exponent / system.turn:.3f}, drift {got.wrong:.2f} -> "
        f"{got.error:.3f} (expected {got.expected:.3f} +- {got.spread:.3f}), bands hold "
        f"{got.coverage:.3f} +- {got.coverage_sd:.3f}, noise {noise.mean():.4f} +- "
        f"{noise.std():.4f}, log evidence {evidence:+.1f}, valid {wrong.mean():.2f} -> "
        f"{mended.mean():.2f} Lyapunov times (gain error {gain_error:.2f})"
    )
    assert got.error < got.expected + 4 * got.spread
    assert got.error < 0.25 * got.wrong
    assert abs(got.coverage - 0.9) < 4 * got.coverage_sd
    assert abs(noise.mean() - NOISE) < 4 * noise.std()
    assert evidence > 4 * np.hypot(without.error, with_it.error)
    assert gain.mean() > 4 * gain_error
