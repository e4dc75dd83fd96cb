"""From import to posterior: CPU seconds of whole programs, compilation included.

    python benchmarks/bench_first_posterior.py [--cases NAME ...] [--peers FOLDER]

Each case is a process of its own: import, 500 + 500 draws, end. Printed are CPU seconds of the
process (all threads), what of it JAX traced and compiled, the smallest effective size of the
parameters and of the path, and effective draws a second with everything counted. Byte code of the
package is made before, as pip makes it. Peers that are not installed (cuthbert; dynestyx, for
Python 3.12 and later) are left out and named; FOLDER may hold them. On a machine with other work
the numbers grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DRAWS = 500
# What is set outside would change what is measured.
SETTINGS = ("XLA_FLAGS", "JAX_", "PYTHONDONTWRITEBYTECODE")


class Phases:
    """Seconds that JAX reports to have traced and compiled, by its own events."""

    def __init__(self):
        import jax

        self.compile = self.trace = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.compile += seconds


def smallest_ess(samples):
    """Smallest effective size of scalar sites and of every tenth time of a path."""
    from numpyro.diagnostics import effective_sample_size

    sizes = []
    for name, value in samples.items():
        value = np.asarray(value)
        if value.ndim == 1:
            sizes.append(float(effective_sample_size(value[None])))
        elif name == "x":
            sizes.append(float(np.min(effective_sample_size(value[None, :, 10::10]))))
    return min(sizes)


def run_mcmc(kernel, *data, seed=0):
    import jax
    from numpyro.infer import MCMC

    mcmc = MCMC(kernel, num_warmup=DRAWS, num_samples=DRAWS, progress_bar=False)
    mcmc.run(jax.random.key(seed), *data)
    return jax.block_until_ready(mcmc.get_samples())


def ours(cache=None):
    """Import the package as its README says."""
    import numpyro_sde as nsde

    nsde.configure_cpu()
    if cache:
        nsde.enable_compilation_cache(cache)
    return nsde


def reparametrised(nsde, model, how):
    import numpyro

    return nsde.infer.SplitNUTS(numpyro.handlers.reparam(model, config={"x": how}))


def case_guided(cases, seed=0, cache=None):
    nsde = ours(cache)
    kernel = reparametrised(nsde, cases.lv_model, nsde.reparam.GuidedReparam())
    return run_mcmc(kernel, cases.lv_data(seed)), kernel


def case_numpyro_alone(cases):
    """Two parameters and five numbers, without this package: what no model can be below."""
    from numpyro.infer import NUTS

    return run_mcmc(NUTS(cases.two_numbers), np.arange(5.0))


def case_guided_again_cached(cases):
    """A second run in the same process, the compiled programs on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return case_guided_again(cases, folder)


def case_guided_again(cases, cache=None):
    """A second run in the same process: seconds of that alone."""
    _, kernel = case_guided(cases, cache=cache)
    start = time.process_time()
    samples = run_mcmc(kernel, cases.lv_data(0), seed=1)
    return samples, time.process_time() - start


def case_gradient(cases):
    """Milliseconds of one gradient along the guided path."""
    nsde = ours()
    import jax
    import numpyro
    from measure import compiled, cpu_ms
    from numpyro.infer import init_to_median
    from numpyro.infer.util import initialize_model

    model = numpyro.handlers.reparam(cases.lv_model, config={"x": nsde.reparam.GuidedReparam()})
    ready = initialize_model(
        jax.random.key(0), model, model_args=(cases.lv_data(0),), init_strategy=init_to_median
    )
    gradient, _ = compiled(jax.value_and_grad(ready.potential_fn), ready.param_info.z)
    return cpu_ms(gradient, ready.param_info.z, repeats=200)


def case_whitened(cases):
    nsde = ours()
    return run_mcmc(
        reparametrised(nsde, cases.lv_model, nsde.reparam.InnovationReparam()), cases.lv_data(0)
    )


def integrated(nsde, model, method):
    from numpyro.infer import NUTS

    return NUTS(nsde.handlers.marginalize(model, method=method))


def case_extended(cases):
    nsde = ours()
    kernel = integrated(nsde, cases.lv_model, nsde.filters.ExtendedKalman())
    return run_mcmc(kernel, cases.lv_data(0))


def case_plain_numpyro(cases):
    from numpyro.infer import NUTS

    return run_mcmc(NUTS(cases.plain_lv_model), cases.lv_data(0))


def case_nile(cases):
    nsde = ours()
    nile = nsde.datasets.load_nile_flow()
    kernel = reparametrised(nsde, cases.nile_model, nsde.reparam.GuidedReparam())
    return run_mcmc(kernel, nile.times, nile.flow / 100)


def case_ou(cases):
    nsde = ours()
    import numpyro

    numpyro.enable_x64()
    return run_mcmc(integrated(nsde, cases.ou_model, nsde.filters.Kalman()), *cases.ou_data())


def case_ou_by_hand(cases):
    import numpyro
    from numpyro.infer import NUTS

    numpyro.enable_x64()
    return run_mcmc(NUTS(cases.scalar_filter_model), *cases.ou_data())


def case_ou_cuthbert(cases):
    import numpyro
    from numpyro.infer import NUTS

    numpyro.enable_x64()
    return run_mcmc(NUTS(cases.cuthbert_model), *cases.ou_data())


def case_ou_dynestyx(cases):
    import jax
    import numpyro
    from numpyro.infer import NUTS

    numpyro.enable_x64()
    times, y = cases.ou_data()
    return run_mcmc(NUTS(cases.dynestyx_model), times, jax.numpy.asarray(y))


def case_path_guide(cases):
    """SVI of 1,500 steps and 500 draws; seconds beyond the training proper are shown."""
    nsde = ours()
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO

    y = np.array([-1.0, -0.7, 0.9, 1.1, 0.8])
    guide = nsde.guides.AutoPathGuide(cases.well_model)
    loss = Trace_ELBO(num_particles=8)
    svi = SVI(cases.well_model, guide, numpyro.optim.Adam(1e-2), loss)

    def train():
        return jax.block_until_ready(svi.run(jax.random.key(0), 1500, y, progress_bar=False))

    before = time.process_time()
    result = train()
    first = time.process_time() - before
    samples = guide.sample_posterior(jax.random.key(1), result.params, y, sample_shape=(DRAWS,))
    jax.block_until_ready(samples)
    total = time.process_time()
    before = total
    train()
    training = min(time.process_time() - before, first)
    return total - training


def case_particle_gibbs(cases):
    nsde = ours()
    kernel = nsde.infer.ParticleGibbs(cases.lv_model, num_particles=32)
    return run_mcmc(kernel, cases.lv_data(0))


def case_rough(cases):
    nsde = ours()
    y = np.cumsum(np.random.default_rng(0).normal(size=1001)) * 0.1
    return run_mcmc(integrated(nsde, cases.rough_model, nsde.filters.Kalman()), y)


def case_hermite(cases):
    ours()
    from numpyro.infer import NUTS

    rng = np.random.default_rng(0)
    x = [0.5]
    for _ in range(300):
        x.append(x[-1] + 0.1 * (x[-1] - x[-1] ** 3) + 0.5 * np.sqrt(0.1) * rng.normal())
    return run_mcmc(NUTS(cases.rate_model), 0.1 * np.arange(301), np.array(x))


def case_particle_filter(cases):
    """Seconds of a second call of `filter_path(Particle(50))`, with new data."""
    nsde = ours()
    import jax
    import numpyro.distributions as dist

    grid = nsde.TimeGrid(np.arange(41.0), max_step=1.0001 / cases.LV_SUBSTEPS)
    sde = nsde.SDE(cases.lv_drift, cases.lv_diffusion, params=cases.LV_TRUTH)
    path = nsde.SDEPath(sde, grid, dist.Normal(np.zeros(2), 0.3).to_event(1))

    def call(seed):
        start = time.process_time()
        result = nsde.filter_path(
            path,
            lambda t, x: dist.Normal(x, cases.LV_NOISE).to_event(1),
            cases.lv_data(seed),
            method=nsde.filters.Particle(50),
            at=grid.index[1:],
        )
        jax.block_until_ready(result.log_likelihood)
        return time.process_time() - start

    call(0)
    return call(1)


# Name, what it must show, how it is run.
CASES = {
    "NumPyro alone, two parameters": ("", case_numpyro_alone),
    "guided": ("under 15 s, ESS >= 400", case_guided),
    "guided, again in the process": ("under 4 s", case_guided_again),
    "guided, again in the process, cache": ("under 4 s", case_guided_again_cached),
    "guided, new data, second process, cache": ("under 6 s", "cached"),
    "guided, one gradient (ms)": ("under 0.5 ms", case_gradient),
    "whitened": ("12 s", case_whitened),
    "integrated out, ExtendedKalman": ("8 s", case_extended),
    "plain NumPyro, whitened by hand": ("", case_plain_numpyro),
    "Nile of the README": ("8 s", case_nile),
    "OU, 1,000 points, Kalman": ("8.5 s", case_ou),
    "OU, scalar filter by hand, NumPyro": ("", case_ou_by_hand),
    "OU, cuthbert": ("", case_ou_cuthbert),
    "OU, dynestyx": ("", case_ou_dynestyx),
    "AutoPathGuide, beyond training": ("15 s", case_path_guide),
    "ParticleGibbs, 32 particles": ("20 s", case_particle_gibbs),
    "MarkovFBM, Kalman, 1,001 points": ("10 s", case_rough),
    "HermiteExpansion(2)": ("5 s", case_hermite),
    "filter_path(Particle(50)), second call": ("under 0.05 s", case_particle_filter),
}


def run_here(name, cache):
    """Run one case in this process and print its numbers."""
    import first_posterior_cases as cases

    phases = Phases()
    how = CASES[name][1]
    if how == "cached":
        result = case_guided(cases, seed=int(os.environ["BENCH_SEED"]), cache=cache)
    else:
        result = how(cases)
    seconds = time.process_time()
    ess = None
    if isinstance(result, tuple):
        result, again = result
        seconds = again if isinstance(again, float) else seconds
    if isinstance(result, float):
        seconds = result
    else:
        ess = smallest_ess(result)
    print("RESULT " + json.dumps({"seconds": seconds, "compile": phases.compile, "ess": ess}))


def run_apart(name, peers, **environment):
    command = [sys.executable, __file__, "--here", name]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *peers]
    given = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    done = subprocess.run(
        command,
        env={**given, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peers", nargs="*", default=[], help="folders with installed peers")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        run_here(arguments.here, os.environ.get("BENCH_CACHE"))
        return
    package = Path(__file__).parents[1] / "numpyro_sde"
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(package)], check=True)
    print("| case | must show | CPU s | compiling s | min ESS | ESS / s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.cases:
        extra = {}
        with tempfile.TemporaryDirectory() as folder:
            if CASES[name][1] == "cached":
                extra = {"BENCH_CACHE": folder, "BENCH_SEED": "0"}
                run_apart(name, arguments.peers, **extra)
                extra["BENCH_SEED"] = "1"
            found = run_apart(name, arguments.peers, **extra)
        if "error" in found:
            print(f"| {name} | {CASES[name][0]} | not run: {found['error'][:80]} | | | |")
            continue
        ess, seconds = found["ess"], found["seconds"]
        tail = "| |" if ess is None else f"{ess:.0f} | {ess / seconds:.1f} |"
        row = f"| {name} | {CASES[name][0]} | {seconds:.2f} | {found['compile']:.1f} | {tail}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
