"""`AutoFlow` beside NumPyro's own guides: how near the evidence they come, and at what cost.

Two posteriors whose evidence is known. A banana: `a, b ~ N(0, 1)` and an observation 1.0 of
`N(a^2 + b, 0.15)`, a curved ridge with two arms, by quadrature on a grid of 8001 x 8001 points
over [-8, 8]^2. Eight schools (Rubin 1981), centred, ten unknowns in a funnel, by quadrature over
the spread, the rest being normal. Every guide is trained alike, from each seed: Adam from 1e-2
decaying linearly to zero, 4,000 steps of 16 particles. The ELBO is that of 20,000 fresh draws.

Claims: no guide beats the evidence; on both posteriors the default flow comes nearer than a
multivariate normal. Run with `make bench`, or `python benchmarks/bench_flows.py`.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from jax.example_libraries.optimizers import polynomial_decay
from measure import compiled
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoMultivariateNormal
from numpyro.infer.util import log_density

import numpyro_sde as nsde

STEPS, PARTICLES, SEEDS, DRAWS = 4000, 16, 10, 20_000
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

GUIDES = {
    **{
        f'AutoFlow, "{flow}"': partial(nsde.guides.AutoFlow, flow=flow)
        for flow in ("spline", "affine", "iaf", "bnaf")
    },
    "NumPyro AutoMultivariateNormal": AutoMultivariateNormal,
    "NumPyro AutoIAFNormal": AutoIAFNormal,
    "NumPyro AutoBNAFNormal": AutoBNAFNormal,
}


def banana():
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a**2 + b, 0.15), obs=1.0)


def schools():
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        effect = numpyro.sample("effect", dist.Normal(mean, spread))
        numpyro.sample("y", dist.Normal(effect, ERRORS), obs=jnp.asarray(EFFECTS))


def schools_evidence():
    """Log evidence: given the spread the effects are normal, with 25 as variance of their mean."""
    log_spread = np.linspace(-12.0, 16.0, 4001)
    spread = np.exp(log_spread)
    log_prior = np.log(2.0 / (5.0 * np.pi)) - np.log1p((spread / 5.0) ** 2)
    variances = spread[:, None, None] ** 2 * np.eye(8) + np.diag(ERRORS**2) + 25.0
    solved = np.linalg.solve(variances, np.broadcast_to(EFFECTS[:, None], (4001, 8, 1)))
    log_likelihood = -0.5 * (
        EFFECTS @ solved[..., 0].T + np.linalg.slogdet(variances)[1] + 8 * np.log(2.0 * np.pi)
    )
    # The last factor is the Jacobian of the logarithm.
    return float(np.log(np.trapezoid(np.exp(log_prior + log_likelihood) * spread, log_spread)))


POSTERIORS = {"banana": (banana, 1.29697), "eight schools": (schools, -schools_evidence())}


class Fitted(NamedTuple):
    """Of each seed its bound and standard error; seconds of one training and of compiling it."""

    bounds: np.ndarray  # -ELBO; NaN where the training diverged
    errors: np.ndarray
    train: float  # CPU time
    compile: float


def log_weights(model, guide, params, key):
    """Log of model over guide at fresh draws: their mean is the ELBO."""

    def one(key):
        seeded = handlers.substitute(handlers.seed(guide, key), params)
        log_q, trace = log_density(seeded, (), {}, {})
        return log_density(handlers.replay(model, trace), (), {}, {})[0] - log_q

    return lax.map(one, jax.random.split(key, DRAWS), batch_size=1000)


def fit(model: Any, make: Any) -> Fitted:
    guide = make(model, init_loc_fn=init_to_median)
    optimizer = numpyro.optim.Adam(polynomial_decay(1e-2, STEPS, 0.0))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=PARTICLES))

    def train(state):
        return lax.scan(lambda state, _: (svi.update(state)[0], None), state, length=STEPS)[0]

    states = [svi.init(jax.random.key(seed)) for seed in range(SEEDS)]
    run, compile_seconds = compiled(train, states[0])
    weigh = jax.jit(partial(log_weights, model, guide))
    bounds, errors, seconds = [], [], []
    for seed, state in enumerate(states):
        start = time.process_time()
        params = svi.get_params(jax.block_until_ready(run(state)))
        seconds.append(time.process_time() - start)
        weights = np.asarray(weigh(params, jax.random.key(100 + seed)), np.float64)
        bounds.append(-weights.mean())
        errors.append(weights.std(ddof=1) / DRAWS**0.5)
    return Fitted(np.array(bounds), np.array(errors), float(np.median(seconds)), compile_seconds)


def report(name, exact, fits):
    print(f"\n{name}: -log Z {exact:.4f}; {STEPS} steps of {PARTICLES} particles, {SEEDS} seeds")
    head = ("-ELBO", "s.e.", "gap", "least", "most", "CPU s", "compile", "finite")
    print(f"  {'(medians over seeds)':<32}" + "".join(f"{word:>9}" for word in head))
    for guide, found in fits.items():
        finite = np.isfinite(found.bounds)
        bounds, errors = found.bounds[finite], found.errors[finite]
        middle = np.median(bounds)
        numbers = (middle, np.median(errors), middle - exact, bounds.min() - exact)
        print(
            f"  {guide:<32}"
            + "".join(f"{number:>9.4f}" for number in (*numbers, bounds.max() - exact))
            + f"{found.train:>9.2f}{found.compile:>9.1f}{finite.mean():>9.0%}"
        )


@pytest.mark.parametrize("name", POSTERIORS)
def test_gap_to_the_evidence(name):
    model, exact = POSTERIORS[name]
    fits = {guide: fit(model, make) for guide, make in GUIDES.items()}
    report(name, exact, fits)
    for found in fits.values():
        finite = np.isfinite(found.bounds)
        assert np.all((found.bounds - exact > -4 * found.errors)[finite])
    spline, normal = fits['AutoFlow, "spline"'], fits["NumPyro AutoMultivariateNormal"]
    assert spline.bounds.max() < np.nanmin(normal.bounds)


if __name__ == "__main__":
    for posterior in POSTERIORS:
        test_gap_to_the_evidence(posterior)
