"""Natural-gradient steps of a Gaussian path beside SING's: time to equal smoothing means.

SING (Hu, Smith and Linderman 2025, https://github.com/lindermanlab/sing) is run from its own
repository, in an environment of its own; nothing of it is here but calls. Both have the same
family, Euler steps, known parameters and quadrature, so the same optimum, in float64. Problems:

- well: double well `4 (x - x^3)`, noise 1, 401 times, 40 readings with noise 0.3.
- predators: Lotka-Volterra in log coordinates, noise 0.2, 401 times, 40 readings of both with noise
  0.2. (SING's noise is the same in all directions at all states.)
- prey: the same, 20 readings of the prey alone.
- duffing: the oscillator of SING's own demonstration of inference, one of its trials: 1,000 times,
  300 readings of ten outputs.

    python benchmarks/bench_natural.py ours FOLDER [PROBLEM ...]     steps of `fit_natural`
    PYTHONPATH=sing python benchmarks/bench_natural.py sing FOLDER [PROBLEM ...]
                                                                     in SING's environment

Printed: CPU seconds of set-up with compilation, and of the steps until no mean is farther than
0.05 standard deviations from the last step's; by the second, what ours are of its best.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

NEAR = 0.05


class Problem(NamedTuple):
    """A known equation with additive noise, and readings `C x + d` with independent noise.

    Attributes:
        drift: of an array module and a state `(dim,)`.
        sigma: noise of the equation, the same in all directions.
        times: equal steps.
        first: mean of the first state, whose standard deviations are 0.1.
        at: places of the readings among the times.
        C: matrix, `(outputs, dim)`; d: offsets; noise: standard deviation of each output.
        y: readings, `(len(at), outputs)`.
    """

    drift: Callable
    sigma: float
    times: np.ndarray
    first: np.ndarray
    at: np.ndarray
    C: np.ndarray
    d: np.ndarray
    noise: np.ndarray
    y: np.ndarray


def simulated(rng, drift, sigma, times, start, inner=20):
    """Euler's steps, twenty for each of the grid."""
    h = (times[1] - times[0]) / inner
    x, path = np.array(start, float), [np.array(start, float)]
    for _ in times[1:]:
        for _ in range(inner):
            x = x + h * drift(np, x) + sigma * h**0.5 * rng.normal(size=x.size)
        path.append(x)
    return np.stack(path)


def problem(name):
    """One of the four, its data from a fixed seed."""
    if name == "well":
        return _well()
    rng = np.random.default_rng(0)
    if name in ("predators", "prey"):

        def drift(xp, x):
            return xp.stack([1.0 - 0.4 * xp.exp(x[1]), 0.4 * xp.exp(x[0]) - 0.4])

        sigma, times, start = 0.2, np.arange(401) * 0.05, np.zeros(2)
        seen, every = (2, 10) if name == "predators" else (1, 20)
        at, C, d = np.arange(every, 401, every), np.eye(seen, 2), np.zeros(seen)
        noise = np.full(seen, 0.2)
    elif name == "duffing":

        def drift(xp, x):
            return xp.stack([x[1], 2.0 * x[0] - x[0] ** 3 - 0.1 * x[1]])

        sigma, times, start = 0.2, np.linspace(0.0, 15.0, 1000), np.array([1.314, 0.1])
        at = np.sort(rng.choice(1000, 300, replace=False))
        C, d, noise = rng.normal(size=(10, 2)), rng.normal(size=10), np.full(10, 0.1**0.5)
    else:
        raise ValueError(f"problems are well, predators, prey and duffing, got {name!r}")
    path = simulated(rng, drift, sigma, times, start)[at]
    y = path @ C.T + d + noise * rng.normal(size=(len(at), len(d)))
    return Problem(drift, sigma, times, start, at, C, d, noise, y)


def _well():
    """The double well, with the data of the docs' first table."""

    def drift(xp, x):
        return 4.0 * (x - x**3)

    times, at = np.arange(401) * 0.02, np.arange(10, 401, 10)
    rng = np.random.default_rng(0)
    # Where the generator stood when the table of the docs was measured.
    rng.normal(size=2028), rng.choice(1000, 300, replace=False), rng.normal(size=10_000)
    h, inner = 0.02, 20
    w = np.empty(401 * inner)
    w[0] = 1.0
    for k in range(1, len(w)):
        w[k] = w[k - 1] + h / inner * 4 * (w[k - 1] - w[k - 1] ** 3)
        w[k] += (h / inner) ** 0.5 * rng.normal()
    y = (w[::inner] + 0.3 * rng.normal(size=401))[at]
    one = np.ones(1)
    return Problem(drift, 1.0, times, one, at, one[None], 0.0 * one, 0.3 * one, y[:, None])


def median_seconds(fn):
    taken = []
    for _ in range(5):
        began = time.process_time()
        fn()
        taken.append(time.process_time() - began)
    return float(np.median(taken))


def report(name, setup, run, means, sds):
    """Steps and seconds until all means `(step, time, dim)` are near the last ones."""
    near = (np.abs(means - means[-1]) / sds).max((1, 2)) < NEAR
    far = np.flatnonzero(~near)  # and where there is no number
    steps = int(far[-1]) + 2 if len(far) else 1
    if steps > len(means) - 5:
        print(f"{name}: set-up {setup:.1f} s, not settled in {len(means)} steps", flush=True)
        return np.inf
    seconds = median_seconds(lambda: run(steps))
    print(f"{name}: set-up {setup:.1f} s, {steps} steps, {seconds:.4f} s", flush=True)
    return seconds


def ours(folder, name):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.handlers import block, seed, substitute
    from numpyro.infer import SVI, Trace_ELBO

    import numpyro_sde as nsde
    from numpyro_sde.guides import AutoPathGuide, natural

    numpyro.enable_x64()
    nsde.configure_cpu()
    p = problem(name)
    to_law = natural._to_law

    def with_moments(place, start, chain):
        """The law's parameters, and its means and factors, which `fit_natural` has no use for."""
        new, first = to_law(place, start, chain)
        mean, root = natural._moments(chain)
        return {**new, "mean_": mean + place.along.guide.reference, "root_": root}, first

    natural._to_law = with_moments

    def model(y):
        sde = nsde.SDE(lambda t, x: p.drift(jnp, x), lambda t, x: p.sigma)
        start = dist.Normal(p.first, 0.1).to_event(1)
        x = numpyro.sample("x", nsde.SDEPath(sde, p.times, start))
        C, d, noise = (jnp.asarray(a) for a in (p.C, p.d, p.noise))
        nsde.observe("y", x, lambda t, x: dist.Normal(C @ x + d, noise).to_event(1), obs=y, at=p.at)

    began = time.process_time()
    y = jnp.asarray(p.y)
    svi = SVI(model, AutoPathGuide(model), numpyro.optim.Adam(1e-3), Trace_ELBO())
    start = svi.get_params(svi.init(jax.random.key(0), y))

    def step(params):
        with block(), seed(rng_seed=0), substitute(data=params):
            new, _ = svi.guide.natural_update(1, (y,), {})
        return params | new, new["x_auto_mean_"], new["x_auto_root_"]

    compiled = jax.jit(step).lower(start).compile()
    setup = time.process_time() - began

    def run(count):
        params, means = start, []
        for _ in range(count):
            new, mean, root = compiled(params)
            params = {key: new[key] for key in start}
            means.append(mean)
        return jax.block_until_ready((means, root))

    means, root = run(25)
    sds = np.sqrt(np.sum(np.asarray(root) ** 2, -1))
    seconds = report(f"{name}, ours", setup, run, np.asarray(means), sds)
    np.savez(folder / f"{name}.npz", means=means[-1], seconds=seconds)


def theirs(folder, name):
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from sing.initialization import initialize_params
    from sing.likelihoods import Gaussian
    from sing.sde import SDE
    from sing.sing import sing_update
    from sing.utils.sing_helpers import natural_to_marginal_params

    p = problem(name)
    dim, count = len(p.first), len(p.times)

    class Known(SDE):
        def drift(self, params, x, t):
            return p.drift(jnp, x)

    began = time.process_time()
    sde, times = Known(dim, 5), jnp.asarray(p.times)
    seen = jnp.zeros(count, bool).at[p.at].set(True)
    y = jnp.zeros((count, len(p.d))).at[p.at].set(p.y)
    outputs = {"C": jnp.asarray(p.C), "d": jnp.asarray(p.d), "R": jnp.asarray(p.noise**2)}
    init = {"mu0": jnp.asarray(p.first), "V0": 0.01 * jnp.eye(dim)}
    first, _, none = initialize_params(sde, {}, init, times, sigma=p.sigma)
    law, still, effect = Gaussian(y[None], seen[None]), jnp.zeros((count, 1)), jnp.zeros((dim, 1))

    def step(state, rho):
        # One iteration a call: several in one call share the first one's gradient.
        return sing_update(
            sde, law, times, y, seen, state, init, still, none, {}, outputs, effect, p.sigma, rho, 1
        )

    compiled = jax.jit(step).lower(first, 0.1).compile()
    marginals = jax.jit(
        lambda state: natural_to_marginal_params(jax.tree.map(lambda a: a[None], state))[0]
    )
    setup = time.process_time() - began
    best = np.inf
    saved = np.load(folder / f"{name}.npz")
    for largest in (0.03, 0.1, 0.3, 0.6, 1.0):
        # Its default goes from 0.001 up to 0.1; here in ten steps.
        rhos = [*np.geomspace(1e-3, largest, 10), *[largest] * 490]
        rhos = [1.0] * 500 if largest == 1.0 else rhos
        state, means = first, []
        for rho in rhos:
            state = compiled(state, rho)
            mean, cov, _ = marginals(state)
            means.append(np.asarray(mean[0]))

        def run(count, rhos=rhos):
            state = first
            for rho in rhos[:count]:
                state = compiled(state, rho)
            jax.block_until_ready(state)

        sds = np.sqrt(np.diagonal(np.asarray(cov[0]), axis1=-2, axis2=-1))
        gap = np.max(np.abs(saved["means"] - means[-1]) / sds)
        seconds = report(f"{name}, SING, steps up to {largest}", setup, run, np.array(means), sds)
        print(f"  last means {gap:.3f} standard deviations from ours", flush=True)
        best = min(best, seconds if gap < NEAR else np.inf)
    if np.isinf(best):
        print(f"{name}: the two do not come to the same means", flush=True)
    else:
        print(f"{name}: ours take {saved['seconds'] / best:.2f} of its best time", flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    for one in sys.argv[3:] or ["well", "predators", "prey", "duffing"]:
        {"ours": ours, "sing": theirs}[sys.argv[1]](place, one)
