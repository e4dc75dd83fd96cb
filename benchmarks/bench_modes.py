"""Paths with several modes against exact answers: `PMMH` and `Tempered`, five seeds each.

The cases are those of `tests/multimodal.py`: a double well seen rarely, one seen without its sign,
a neuron seen by its voltage. Each line is one process from import to posterior, on two cores: wall
seconds, the log evidence less the exact one, the worst mean of a parameter in posterior standard
deviations with its Monte Carlo error, the worst error of a standard deviation, and the worst of the
probabilities of what a path did between two observations. What is out of bounds is marked.

    python benchmarks/bench_modes.py                      # all: an hour
    python benchmarks/bench_modes.py pmmh well 3          # one run
"""

import itertools
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
START = time.perf_counter()

import numpyro  # noqa: E402

import numpyro_sde as nsde  # noqa: E402

nsde.configure_cpu()
numpyro.set_host_device_count(2)

import jax  # noqa: E402
import multimodal  # noqa: E402
import numpy as np  # noqa: E402
from numpyro.diagnostics import effective_sample_size  # noqa: E402
from numpyro.infer import MCMC  # noqa: E402

MODELS = {"well": multimodal.well, "abs": multimodal.folded, "fhn": multimodal.neuron}
GRIDS = {"well": multimodal.WELL_GRID, "abs": multimodal.ABS_GRID, "fhn": multimodal.FHN_GRID}
SITES = {"well": ("scale",), "abs": ("scale",), "fhn": ("epsilon", "scale")}
# Chains, warm-up, draws of each.
PMMH = {"well": (2, 1_000, 8_000), "abs": (2, 1_000, 8_000), "fhn": (2, 1_000, 8_000)}
TEMPERED = {
    "well": ({"num_levels": 12, "reference": "guide"}, 2, 1_000, 20_000),
    "abs": ({"num_levels": 14}, 2, 1_000, 40_000),
    "fhn": ({"num_levels": 16}, 2, 800, 2_000),
}
# Bounds: Monte Carlo errors and posterior sds of a mean, sds, probabilities, nats, wall seconds.
BOUNDS = {"off": 0.1, "errors": 4.0, "sd": 0.1, "path": 0.05, "nats": 0.1, "wall": 240.0}


def exact_parameters(case):
    """Mean and standard deviation of the log of each parameter."""
    found = multimodal.REFERENCE[case]
    if case == "fhn":
        return {site: tuple(found[f"log_{site}"]) for site in SITES[case]}
    return {"scale": (found["log_scale_mean"], found["log_scale_sd"])}


def compare_parameters(case, draws):
    """Worst shift in sds, with its error, and the worst relative error of an sd."""
    worst = (0.0, 1.0, 0.0, np.inf)
    for site, (mean, sd) in exact_parameters(case).items():
        logs = np.log(np.asarray(draws[site], float))
        ess = float(effective_sample_size(logs))
        found = ((logs.mean() - mean) / sd, 1.0 / np.sqrt(ess), logs.std() / sd - 1.0, ess)
        worst = max(worst, found, key=lambda row: abs(row[0]))
    return worst


def compare_paths(case, paths):
    """Largest error of a probability: paths `(draw, time)` or `(draw, time, state)`."""
    index, paths = GRIDS[case].index, np.asarray(paths)
    found = multimodal.REFERENCE[case]
    gaps = [paths[:, a : b + 1] for a, b in itertools.pairwise(index)]
    if case == "fhn":
        # Of the reference the first entry is that of the first time, alone.
        spiked = [(gap[:, 1:, 0] > 0.5).any(1).mean() for gap in gaps]
        return np.max(np.abs(np.array(spiked) - found["p_gapmax"][1:]))
    middle = [(gap[:, gap.shape[1] // 2] > 0).mean() for gap in gaps]
    turned = [(np.sign(gap) != np.sign(gap[:, :1])).any(1).mean() for gap in gaps]
    errors = (
        np.subtract(middle, found["p_mid_positive"]),
        np.subtract(turned, found["p_sign_changed"]),
    )
    return max(np.max(np.abs(e)) for e in errors)


def by_pmmh(case, seed):
    """Default kernel; evidence by its filters; paths at 2,000 of the draws."""
    model, y = MODELS[case], multimodal.data(case)
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = nsde.infer.PMMH(model).tune(keys[0], y)
    chains, warmup, draws = PMMH[case]
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, progress_bar=False)
    mcmc.run(keys[1], y)
    posterior = mcmc.get_samples(group_by_chain=True)
    found = nsde.evidence(mcmc, rng_key=keys[2])
    paths = nsde.smooth(mcmc, rng_key=keys[3], thinning=max(1, chains * draws // 2_000))
    note = f"{kernel.num_particles} particles, {kernel.tuning.method.proposal}"
    return posterior, paths["x"], found.log_evidence, found.error, note


def by_tempering(case, seed):
    """Guided paths, some chains with a ladder each."""
    guided = numpyro.handlers.reparam(MODELS[case], config={"x": nsde.reparam.GuidedReparam()})
    options, chains, warmup, draws = TEMPERED[case]
    kernel = nsde.infer.Tempered(guided, **options)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, progress_bar=False)
    mcmc.run(jax.random.key(seed), multimodal.data(case))
    report = kernel.report(mcmc)
    posterior = mcmc.get_samples(group_by_chain=True)
    note = f"{report.round_trips} round trips"
    if told := report.complaints():
        note += "; says: " + "; ".join(told)
    paths = posterior["x"].reshape(-1, *posterior["x"].shape[2:])
    return posterior, paths, report.log_evidence, report.error, note


def one(engine, case, seed):
    """Run, compare, print a line."""
    run = {"pmmh": by_pmmh, "tempered": by_tempering}[engine]
    draws, paths, log_evidence, error, note = run(case, seed)
    wall, cpu = time.perf_counter() - START, time.process_time()
    off, mc_error, sd, ess = compare_parameters(case, draws)
    path = compare_paths(case, paths)
    nats = log_evidence - multimodal.REFERENCE[case]["log_evidence"]
    measured = {
        "off": off, "errors": off / mc_error, "sd": sd, "path": path, "nats": nats, "wall": wall
    }  # fmt: skip
    missed = [name for name, value in measured.items() if not abs(value) <= BOUNDS[name]]
    mark = f"MISSED {', '.join(missed)}" if missed else "met"
    print(
        f"{engine:<9}{case:<5} seed {seed}: {wall:.0f} s wall, {cpu:.0f} CPU; "
        f"evidence {nats:+.3f} +- {error:.3f}; mean {off:+.3f} +- {mc_error:.3f} sd; "
        f"sd {sd:+.3f}; paths {path:.3f}; ESS {ess:.0f}; {note}: {mark}",
        flush=True,
    )


def main() -> None:
    """Every engine, case and seed, each in a process of its own."""
    wanted = sys.argv[1:]
    if len(wanted) == 3:
        one(wanted[0], wanted[1], int(wanted[2]))
        return
    for engine in wanted[:1] or ("pmmh", "tempered"):
        for case in wanted[1:2] or MODELS:
            for seed in range(5):
                arguments = [sys.executable, __file__, engine, case, str(seed)]
                subprocess.run(arguments, check=True)


if __name__ == "__main__":
    main()
