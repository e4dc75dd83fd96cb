"""Models and fits that `bench_first_posterior.py` times, each in a process of its own."""

from __future__ import annotations

import numpy as np

# Stochastic Lotka-Volterra in log coordinates: 40 observations of both species, 400 Euler steps.
LV_TRUTH = {"birth": 0.5, "predation": 0.6, "growth": 0.5, "death": 0.3, "scale": 0.15}
LV_NOISE, LV_STEP, LV_SUBSTEPS = 0.1, 0.1, 10


def lv_drift(t, x, p):
    import jax.numpy as jnp

    prey, predators = jnp.exp(x[0]), jnp.exp(x[1])
    return jnp.stack([p["birth"] - p["predation"] * predators, p["growth"] * prey - p["death"]])


def lv_diffusion(t, x, p):
    return p["scale"]


def lv_data(seed):
    """Simulate by Euler's scheme, plain NumPy."""
    rng = np.random.default_rng(seed)
    p, x, seen = LV_TRUTH, np.zeros(2), []
    for _ in range(40):
        for _ in range(LV_SUBSTEPS):
            prey, predators = np.exp(x)
            drift = [p["birth"] - p["predation"] * predators, p["growth"] * prey - p["death"]]
            x = x + LV_STEP * np.array(drift) + p["scale"] * np.sqrt(LV_STEP) * rng.normal(size=2)
        seen.append(x + LV_NOISE * rng.normal(size=2))
    return np.array(seen)


def lv_parameters():
    import numpyro
    import numpyro.distributions as dist

    return {
        name: numpyro.sample(name, dist.LogNormal(np.log(value), 0.5))
        for name, value in LV_TRUTH.items()
    }


def lv_model(y=None):
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    grid = nsde.TimeGrid(np.arange(41.0), max_step=1.0001 / LV_SUBSTEPS)
    sde = nsde.SDE(lv_drift, lv_diffusion, params=lv_parameters())
    init = dist.Normal(np.zeros(2), 0.3).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init))
    law = lambda t, x: dist.Normal(x, LV_NOISE).to_event(1)  # noqa: E731
    nsde.observe("y", x, law, obs=y, at=grid.index[1:])


# --- The same model in plain NumPyro, whitened by hand ----------------------------------------


def plain_lv_model(y):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    p = lv_parameters()
    start = numpyro.sample("start", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    steps = 40 * LV_SUBSTEPS
    z = numpyro.sample("z", dist.Normal(jnp.zeros((steps, 2)), 1.0).to_event(2))

    def step(x, z):
        x = x + LV_STEP * lv_drift(0.0, x, p) + p["scale"] * np.sqrt(LV_STEP) * z
        return x, x

    _, x = jax.lax.scan(step, 0.3 * start, z)
    x = numpyro.deterministic("x", x)
    seen = x[LV_SUBSTEPS - 1 :: LV_SUBSTEPS]
    numpyro.sample("y", dist.Normal(seen, LV_NOISE).to_event(2), obs=y)


def two_numbers(y):
    """As little as a posterior can be."""
    import numpyro
    import numpyro.distributions as dist

    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(mean, scale), obs=y)


# --- A scalar process seen 1,000 times --------------------------------------------------------

OU_NOISE = 0.1


def ou_data(num=1000):
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.05, 0.15, num))
    x, path = 0.0, []
    for h in np.diff(times, prepend=times[0]):
        x = x * np.exp(-h) + 0.5 * np.sqrt(-np.expm1(-2.0 * h) / 2.0) * rng.normal()
        path.append(x)
    return times, np.array(path) + OU_NOISE * rng.normal(size=num)


def ou_parameters():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    log_scale = numpyro.sample("log_scale", dist.Normal(-1.0, 1.0))
    return jnp.exp(log_rate), mean, jnp.exp(log_scale)


def ou_model(times, y=None):
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    rate, mean, scale = ou_parameters()
    sde = nsde.SDE(
        lambda t, x, p: p["rate"] * (p["mean"] - x),
        lambda t, x, p: p["scale"],
        params={"rate": rate, "mean": mean, "scale": scale},
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(mean, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, OU_NOISE), obs=y)


def _ou_transitions(times, rate, mean, scale):
    import jax.numpy as jnp

    dt = jnp.asarray(np.diff(times))
    a = jnp.exp(-rate * dt)
    return a, (1.0 - a) * mean, -(scale**2) / (2.0 * rate) * jnp.expm1(-2.0 * rate * dt)


def scalar_filter_model(times, y):
    """A Kalman filter written by hand for this one model."""
    import jax
    import jax.numpy as jnp
    import numpyro

    rate, mean, scale = ou_parameters()

    def update(m, P, y):
        S = P + OU_NOISE**2
        term = -0.5 * ((y - m) ** 2 / S + jnp.log(2.0 * jnp.pi * S))
        return m + P / S * (y - m), P * OU_NOISE**2 / S, term

    m, P, first = update(mean, 1.0, y[0])

    def step(carry, now):
        a, c, q, y = now
        m, P, term = update(a * carry[0] + c, a * a * carry[1] + q, y)
        return (m, P), term

    inputs = (*_ou_transitions(times, rate, mean, scale), jnp.asarray(y[1:]))
    _, terms = jax.lax.scan(step, (m, P), inputs)
    numpyro.factor("filter", first + terms.sum())


def cuthbert_model(times, y):
    """The same filter by cuthbert."""
    import cuthbert
    import jax.numpy as jnp
    import numpyro
    from cuthbert.gaussian import kalman

    rate, mean, scale = ou_parameters()
    a, c, q = _ou_transitions(times, rate, mean, scale)
    first = jnp.zeros(1)
    a, c = jnp.concatenate([first + 1.0, a]), jnp.concatenate([first, c])
    q = jnp.concatenate([first, q])
    eye = jnp.eye(1)

    def dynamics(i):
        return a[i][None, None], c[i][None], jnp.sqrt(q[i])[None, None]

    def observation(i):
        return eye, jnp.zeros(1), OU_NOISE * eye, jnp.asarray(y)[i - 1][None]

    inference = kalman.build_filter(mean[None], eye, dynamics, observation)
    # Its first state is before the first observation: a step of length zero leads there.
    inputs = np.arange(len(times) + 1)
    a, c, q = (jnp.concatenate([v[:1], v]) for v in (a, c, q))
    states = cuthbert.filter(inference, inputs[1:], inference.init_prepare())
    numpyro.factor("filter", states.log_normalizing_constant[-1])


def dynestyx_model(times, y):
    """The same by dynestyx, whose filter solves differential equations between the data."""
    import dynestyx
    import jax.numpy as jnp
    from dynestyx.inference.configs.filter import ContinuousTimeKFConfig

    rate, mean, scale = ou_parameters()
    one = jnp.ones((1, 1))
    process = dynestyx.LTI_continuous(
        A=-rate * one,
        L=scale * one,
        H=one,
        R=OU_NOISE**2 * one,
        b=(rate * mean)[None],
        initial_mean=mean[None],
        initial_cov=one,
    )
    with dynestyx.Filter(filter_config=ContinuousTimeKFConfig()):
        dynestyx.sample("x", process, obs_times=jnp.asarray(times), obs_values=y[:, None])


# --- Others ------------------------------------------------------------------------------------


def nile_model(times, y=None):
    """The README's first example."""
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    rate = numpyro.sample("rate", dist.LogNormal(-2.3, 0.7))
    mean = numpyro.sample("mean", dist.Normal(9.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(-0.7, 0.7))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(
        drift=lambda t, x, p: p["rate"] * (p["mean"] - x),
        diffusion=lambda t, x, p: p["scale"],
        params={"rate": rate, "mean": mean, "scale": scale},
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(mean, 2.0)))
    nsde.observe("y", x, lambda t, x, sd: dist.Normal(x, sd), params=noise, obs=y)


def well_model(y):
    """Five observations of a double well on 400 steps, its diffusion unknown."""
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    grid = nsde.TimeGrid(np.arange(6) * 0.8, max_step=0.01)
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=scale)
    law = nsde.SDEPath(sde, grid, -1.0, scheme=nsde.schemes.LocalLinear())
    x = numpyro.sample("x", law)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=grid.index[1:])


def rough_model(y):
    """A mean-reverting process driven by fractional noise, seen 1,001 times."""
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
        noise=nsde.noise.MarkovFBM(0.3),
    )
    times = np.linspace(0.0, 100.0, len(y))
    x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


def rate_model(times, y):
    """A directly observed process under its Hermite expansion."""
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.DoubleWell(linear=rate, cubic=1.0, scale=scale)
    scheme = nsde.schemes.HermiteExpansion(2)
    numpyro.sample("x", nsde.SDEPath(sde, times, y[0], scheme=scheme), obs=y)
