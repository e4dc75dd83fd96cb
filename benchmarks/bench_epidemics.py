"""A bootstrap filter on an Euler-multinomial epidemic: the package, the same by hand, pypomp.

Run with `pytest benchmarks/bench_epidemics.py -m '' -s`; pypomp takes part where it is installed
(`pip install pypomp`). Influenza in a boarding school: 14 days of 12 steps, three binomial numbers
a step, particles resampled at each datum. By hand is one `lax.scan` over particles in arrays with
the same binomial numbers and nothing else. pypomp's `fast_binomial` approximates the inverse
distribution function; ours inverts it. CPU time of compiled programs, in turns. Measured on a
shared core, ns for each particle and step, float32 and float64: 193 and 263 (package), 141 and 180
(by hand), 301 and 331 (pypomp 1.1.0).
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import gammaln
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.schemes.inversion import binomial

NUM_PARTICLES, ROUNDS, STEPS = 5000, 7, 12
BETA, ONSET, RECOVERY, SHARE = 3.47, 1.70, 1 / 3, 0.885
FLU = nsde.datasets.load_boarding_school_flu()


def ours():
    def model(y):
        net = nsde.ReactionNetwork(
            [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
            [[0, 0, 0], [2, 0, 0], [0, 1, 0]],
            jnp.array([BETA / 763, ONSET, RECOVERY]),
        )
        law = nsde.laws.EulerMultinomial(STEPS)
        x = numpyro.sample("x", nsde.ReactionPath(net, np.arange(15.0), [762.0, 1.0, 0.0], law=law))
        nsde.observe(
            "y", x, lambda t, x: dist.Poisson(SHARE * x[2] + 1e-6), obs=y, at=np.arange(1, 15)
        )

    def run(key, y):
        method = nsde.filters.Particle(
            NUM_PARTICLES, proposal="bootstrap", ess_threshold=1.0, key=key
        )
        return log_density(nsde.handlers.marginalize(model, method=method), (y,), {}, {})[0]

    return jax.jit(run)


def by_hand():
    h, M = 1.0 / STEPS, NUM_PARTICLES
    draw = jax.vmap(binomial, in_axes=(0, 0, 0))

    def substep(x, u):
        S, infected, bed = x
        even = jnp.ones_like(S)
        new = draw(u[0], S, -jnp.expm1(-h * BETA / 763 * infected))
        leave = draw(u[1], infected, -jnp.expm1(-h * ONSET) * even)
        back = draw(u[2], bed, -jnp.expm1(-h * RECOVERY) * even)
        return jnp.stack([S - new, infected + new - leave, bed + leave - back]), None

    def day(x, now):
        y, key = now
        move_key, choose_key = jax.random.split(key)
        x, _ = jax.lax.scan(substep, x, jax.random.uniform(move_key, (STEPS, 3, M)))
        mean = SHARE * x[2] + 1e-6
        log_weights = y * jnp.log(mean) - mean - gammaln(y + 1.0)
        top = jnp.max(log_weights)
        weights = jnp.exp(log_weights - top)
        sums = jnp.cumsum(weights)
        places = (jnp.arange(M) + jax.random.uniform(choose_key)) / M * sums[-1]
        return x[:, jnp.searchsorted(sums, places)], top + jnp.log(jnp.mean(weights))

    def run(key, y):
        start = jnp.tile(jnp.array([[762.0], [1.0], [0.0]]), (1, M))
        return jnp.sum(jax.lax.scan(day, start, (y, jax.random.split(key, 14)))[1])

    return jax.jit(run)


def of_pypomp():
    pypomp = pytest.importorskip("pypomp")
    import pandas as pd
    from pypomp.random.binom import fast_binomial
    from pypomp.types import (
        CovarDict,
        InitialTimeFloat,
        ObservationDict,
        ParamDict,
        RNGKey,
        StateDict,
        StepSizeFloat,
        TimeFloat,
    )

    def rinit(theta_: ParamDict, key: RNGKey, covars: CovarDict, t0: InitialTimeFloat):
        del theta_, key, covars, t0
        return {"S": 762.0, "I": 1.0, "B": 0.0}

    def rproc(
        X_: StateDict,
        theta_: ParamDict,
        key: RNGKey,
        covars: CovarDict,
        t: TimeFloat,
        dt: StepSizeFloat,
    ):
        del covars, t
        keys = jax.random.split(key, 3)
        S, infected, bed = X_["S"], X_["I"], X_["B"]
        new = fast_binomial(keys[0], S, -jnp.expm1(-dt * theta_["beta"] / 763 * infected))
        leave = fast_binomial(keys[1], infected, -jnp.expm1(-dt * theta_["onset"]))
        back = fast_binomial(keys[2], bed, -jnp.expm1(-dt * theta_["recovery"]))
        return {"S": S - new, "I": infected + new - leave, "B": bed + leave - back}

    def dmeas(
        Y_: ObservationDict, X_: StateDict, theta_: ParamDict, covars: CovarDict, t: TimeFloat
    ):
        del covars, t
        mean = theta_["share"] * X_["B"] + 1e-6
        return Y_["y"] * jnp.log(mean) - mean - gammaln(Y_["y"] + 1.0)

    theta = {"beta": BETA, "onset": ONSET, "recovery": RECOVERY, "share": SHARE}
    model = pypomp.Pomp(
        ys=pd.DataFrame({"y": FLU.confined}, index=pd.Index(FLU.times)),
        theta=pypomp.PompParameters(theta),
        statenames=["S", "I", "B"],
        t0=0.0,
        nstep=STEPS,
        rinit=rinit,
        rproc=rproc,
        dmeas=dmeas,
    )

    def run(key, y):
        del y
        model.pfilter(J=NUM_PARTICLES, key=key)
        return float(np.squeeze(np.asarray(model.theta.logLik)))

    return run


def seconds(run, key):
    begun = time.process_time()
    value = float(jax.block_until_ready(run(key, jnp.asarray(FLU.confined))))
    return time.process_time() - begun, value


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_cost_of_a_particle_step(wide):
    nsde.configure_cpu()
    with jax.enable_x64(wide):
        runs = {"numpyro_sde": ours(), "by hand": by_hand()}
        try:
            runs["pypomp"] = of_pypomp()
        except pytest.skip.Exception:
            print("\npypomp is not installed: left out")
        compile_s = {name: seconds(run, jax.random.key(99))[0] for name, run in runs.items()}
        taken = {name: [] for name in runs}
        values = {name: [] for name in runs}
        for k in range(ROUNDS):
            for name, run in runs.items():
                cost, value = seconds(run, jax.random.key(k))
                taken[name].append(1e9 * cost / (NUM_PARTICLES * 14 * STEPS))
                values[name].append(value)
    print(f"\n{'':<14}{'ns a particle-step':>20}{'least':>8}{'first call s':>14}{'log lik.':>10}")
    for name, ns in taken.items():
        middle, mean = np.median(ns), np.mean(values[name])
        print(f"{name:<14}{middle:>20.0f}{min(ns):>8.0f}{compile_s[name]:>14.2f}{mean:>10.2f}")
    assert np.median(taken["numpyro_sde"]) < 2.0 * np.median(taken["by hand"])
    if "pypomp" in taken:
        assert np.median(taken["numpyro_sde"]) < np.median(taken["pypomp"])
