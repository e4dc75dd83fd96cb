"""Natural-gradient steps of a Gaussian path beside SING's: time to equal smoothing means.

SING (Hu, Smith and Linderman 2025, https://github.com/lindermanlab/sing) is run from its own
repository, in an environment of its own; nothing of it is here but calls. Both have the same
family, Euler steps, known parameters and five quadrature points, so the same optimum. Double well
`4 (x - x^3)`, noise 1, 401 times, 40 readings with noise 0.3, float64.

    python benchmarks/bench_natural.py ours FOLDER     steps of `fit_natural`
    PYTHONPATH=sing python benchmarks/bench_natural.py sing FOLDER    in SING's environment

Printed: CPU seconds of set-up with compilation, and of the steps until no mean is farther than
0.05 standard deviations from the last step's.
"""

import sys
import time
from pathlib import Path

import numpy as np

NEAR = 0.05
TIMES = np.arange(401) * 0.02
AT = np.arange(10, 401, 10)


def data():
    rng = np.random.default_rng(0)
    # Where the generator stood when the table of the docs was measured.
    rng.normal(size=2028), rng.choice(1000, 300, replace=False), rng.normal(size=10_000)
    h, inner = 0.02, 20
    w = np.empty(401 * inner)
    w[0] = 1.0
    for k in range(1, len(w)):
        w[k] = w[k - 1] + h / inner * 4 * (w[k - 1] - w[k - 1] ** 3)
        w[k] += (h / inner) ** 0.5 * rng.normal()
    return (w[::inner] + 0.3 * rng.normal(size=401))[AT]


def median_seconds(fn):
    taken = []
    for _ in range(5):
        began = time.process_time()
        fn()
        taken.append(time.process_time() - began)
    return float(np.median(taken))


def report(name, setup, run, means, sds):
    """Steps and seconds until all means are near the last ones."""
    far = np.flatnonzero((np.abs(means - means[-1]) / sds).max(1) >= NEAR)
    steps = int(far[-1]) + 2 if len(far) else 1
    seconds = median_seconds(lambda: run(steps))
    print(f"{name}: set-up {setup:.1f} s, {steps} steps, {seconds:.4f} s", flush=True)


def ours(folder):
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
    to_law = natural._to_law

    def with_moments(place, start, chain):
        """The law's parameters, and its means and factors, which `fit_natural` has no use for."""
        new, first = to_law(place, start, chain)
        mean, root = natural._moments(chain)
        return {**new, "mean_": mean + place.along.guide.reference, "root_": root}, first

    natural._to_law = with_moments

    def model(y):
        sde = nsde.SDE(lambda t, x: 4.0 * (x - x**3), lambda t, x: 1.0)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(1.0, 0.1)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=AT)

    began = time.process_time()
    y = jnp.asarray(data())
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
    means, sds = np.asarray(means)[..., 0], np.abs(np.asarray(root)[:, 0, 0])
    report("ours", setup, run, means, sds)
    np.save(folder / "ours.npy", means[-1])


def theirs(folder):
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from sing.initialization import initialize_params
    from sing.likelihoods import Gaussian
    from sing.sde import SDE
    from sing.sing import sing_update
    from sing.utils.sing_helpers import natural_to_marginal_params

    class Well(SDE):
        def drift(self, params, x, t):
            return 4.0 * (x - x**3)

    began = time.process_time()
    sde, times = Well(1, 5), jnp.asarray(TIMES)
    seen = jnp.zeros(len(TIMES), bool).at[AT].set(True)
    y = jnp.zeros((len(TIMES), 1)).at[AT, 0].set(data())
    outputs = {"C": jnp.ones((1, 1)), "d": jnp.zeros(1), "R": 0.09 * jnp.ones(1)}
    init = {"mu0": jnp.ones(1), "V0": 0.01 * jnp.eye(1)}
    first, _, none = initialize_params(sde, {}, init, times, sigma=1.0)
    law, still, effect = Gaussian(y[None], seen[None]), jnp.zeros((401, 1)), jnp.zeros((1, 1))

    def step(state, rho):
        # One iteration a call: several in one call share the first one's gradient.
        return sing_update(
            sde, law, times, y, seen, state, init, still, none, {}, outputs, effect, 1.0, rho, 1
        )

    compiled = jax.jit(step).lower(first, 0.1).compile()
    marginals = jax.jit(
        lambda state: natural_to_marginal_params(jax.tree.map(lambda a: a[None], state))[0]
    )
    setup = time.process_time() - began
    for largest in (0.1, 0.3, 1.0):
        # Its default goes from 0.001 up to 0.1; here in ten steps.
        rhos = [*np.geomspace(1e-3, largest, 10), *[largest] * 90]
        rhos = [1.0] * 100 if largest == 1.0 else rhos
        state, means = first, []
        for rho in rhos:
            state = compiled(state, rho)
            mean, cov, _ = marginals(state)
            means.append(np.asarray(mean[0, :, 0]))

        def run(count, rhos=rhos):
            state = first
            for rho in rhos[:count]:
                state = compiled(state, rho)
            jax.block_until_ready(state)

        sds = np.sqrt(np.asarray(cov[0, :, 0, 0]))
        report(f"SING, steps up to {largest}", setup, run, np.array(means), sds)
        if (folder / "ours.npy").exists():
            gap = np.abs(np.load(folder / "ours.npy") - means[-1]) / sds
            print(f"  last means {gap.max():.3f} standard deviations from ours", flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    {"ours": ours, "sing": theirs}[sys.argv[1]](place)
