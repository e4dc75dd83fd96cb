"""What `Tempered` costs where it is not needed: a posterior of one mode, `SplitNUTS` beside it.

The state of a double well seen often, so that its side is never in doubt: 40 observations with
noise 0.1, four steps between them, the scale of the noise unknown. Both engines sample the guided
path. CPU seconds of sampling and warm-up, compilation apart, for a thousand effective draws of the
worst of the scale and the path at every fifth time.

    python benchmarks/bench_tempering_cost.py
"""

import time

import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde

nsde.configure_cpu()

import jax  # noqa: E402
from numpyro.diagnostics import effective_sample_size  # noqa: E402
from numpyro.infer import MCMC  # noqa: E402

GRID = nsde.TimeGrid(0.25 * np.arange(40), 0.0625)
# Engines with warm-up and draws.
ENGINES = {
    "SplitNUTS": (nsde.infer.SplitNUTS, {}, 500, 2_000),
    "Tempered, from the guide": (
        nsde.infer.Tempered, {"num_levels": 4, "reference": "guide"}, 500, 4_000,
    ),
    "Tempered, from the prior": (nsde.infer.Tempered, {"num_levels": 16}, 1_000, 4_000),
}  # fmt: skip


def model(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(-0.7, 0.3))
    well = nsde.processes.DoubleWell(2.0, 2.0, scale)
    x = numpyro.sample("x", nsde.SDEPath(well, GRID, dist.Normal(1.0, 0.2)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y, at=GRID.index)


def simulated():
    with numpyro.handlers.seed(rng_seed=1), numpyro.handlers.condition(data={"scale": 0.5}):
        return np.asarray(numpyro.handlers.trace(model).get_trace()["y"]["value"])


def fit(engine, y):
    """Draws, and CPU seconds of a second run, which compiles nothing."""
    kind, options, warmup, draws = ENGINES[engine]
    kernel = kind(
        numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()}), **options
    )
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    before = time.process_time()
    mcmc.run(jax.random.key(1), y)
    jax.block_until_ready(mcmc.get_samples())
    seconds = time.process_time() - before
    if isinstance(kernel, nsde.infer.Tempered):
        print(kernel.report(mcmc))
    return mcmc.get_samples(), seconds


def main() -> None:
    """One line each."""
    y, cost = simulated(), {}
    for engine in ENGINES:
        samples, seconds = fit(engine, y)
        seen = [np.log(samples["scale"]), *np.asarray(samples["x"])[:, ::5].T]
        ess = min(float(effective_sample_size(np.asarray(a, float)[None])) for a in seen)
        cost[engine] = 1e3 * seconds / ess
        logs = np.log(np.asarray(samples["scale"], float))
        print(
            f"{engine:<26} log scale {logs.mean():.3f} ({logs.std():.3f}); {seconds:.1f} CPU s, "
            f"ESS {ess:.0f}: {cost[engine]:.2f} s a thousand, "
            f"{cost[engine] / cost['SplitNUTS']:.1f} x SplitNUTS",
            flush=True,
        )


if __name__ == "__main__":
    main()
