"""Weights of a learned drift of a path that is not seen: laws of them in `AutoPathGuide` compared.

Run: python benchmarks/bench_conjugate.py

A double well read 40 times with noise, 8 sines, amplitude unknown (the model of
`tests/fields/test_latent_agreement.py`). The truth is a run of Gibbs with collapsed weights. For
each law of the weights: means of the drift on [-1.4, 1.4] in posterior sds from it, sds over its
sds, the bound, the log evidence by importance and the share of effective draws, and CPU seconds of
the steps, compiled before.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.guides import AutoPathGuide, ControlledPath, conjugate_fit, fit_conjugate
from numpyro_sde.guides.training import compiled_steps

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fields"))

from test_latent_agreement import data, gibbs, model, values

RATE, PARTICLES = 3e-3, 8


def truth(y):
    draws = gibbs(y).get_samples()
    band = np.asarray(values(draws["f/z"], draws["f/amplitude"]))
    return band.mean(0), band.std(0)


def line(name, steps, seconds, guide, params, y, reference):
    drawn = guide.sample_posterior(jax.random.key(3), params, y, sample_shape=(4000,))
    band = np.asarray(values(drawn["f/z"], drawn["f/amplitude"]))
    gap, ratio = (band.mean(0) - reference[0]) / reference[1], band.std(0) / reference[1]

    def loss(key):
        return Trace_ELBO().loss(key, params, model, guide, y)

    keys = jax.random.split(jax.random.key(9), 2000)
    log_weights = -np.asarray(jax.jit(lambda k: jax.lax.map(loss, k, batch_size=100))(keys))
    weights = np.exp(log_weights - log_weights.max())
    evidence = np.log(weights.mean()) + log_weights.max()
    share = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    print(
        f"{name}, {steps} steps, {seconds:.1f} s: means off by {np.abs(gap).max():.3f}, root mean "
        f"square {np.sqrt((gap**2).mean()):.3f}; sds {ratio.min():.2f} to {ratio.max():.2f}; ELBO "
        f"{log_weights.mean():.3f} +- {log_weights.std() / len(weights) ** 0.5:.3f}, log evidence "
        f"{evidence:.3f}, effective {share:.2f}",
        flush=True,
    )


def by_svi(kind, y, reference, pieces):
    guide = AutoPathGuide(model, path=ControlledPath((16,)), weights=kind)
    svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO(num_particles=PARTICLES))
    state, done, seconds = svi.init(jax.random.key(2), y), 0, 0.0
    for piece in pieces:
        run = compiled_steps(svi, piece, (y,), {}).lower(state).compile()
        began = time.process_time()
        state, losses = run(state)
        losses.block_until_ready()
        seconds, done = seconds + time.process_time() - began, done + piece
        line(f"{kind} by SVI", done, seconds, guide, svi.get_params(state), y, reference)


def by_updates(y, reference, rounds, name="conjugate by updates"):
    guide = AutoPathGuide(model, path=ControlledPath((16,)), weights="conjugate")
    svi = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO(num_particles=PARTICLES))

    def fit(num_rounds):
        began = time.process_time()
        found = fit_conjugate(svi, jax.random.key(2), num_rounds, y, progress_bar=False)
        return found, time.process_time() - began

    # What a call compiles is in both of two calls: their difference is that of the rounds.
    fit(1)
    (_, one), (_, many) = fit(1), fit(13)
    for count in rounds:
        found, _ = fit(count)
        seconds = (many - one) / 12 * count
        line(name, 50 * count, seconds, guide, found.params, y, reference)


def main():
    nsde.configure_cpu()
    y = data()
    reference = truth(y)
    by_updates(y, reference, (2, 4, 12))
    by_svi("conjugate", y, reference, (200, 400, 1800))
    by_svi("flow", y, reference, (600, 1800, 1800))
    by_svi("low_rank", y, reference, (600, 1800, 1800))
    whole = conjugate_fit.gathered
    conjugate_fit.gathered = lambda moments, found, size: whole(
        moments, found._replace(lost=0.0 * found.lost), size
    )
    by_updates(y, reference, (12,), "as if the paths were known")


if __name__ == "__main__":
    main()
