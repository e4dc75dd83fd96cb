"""An encoded path law of sparse counts begins near the smoothing law, untrained."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.guides import AutoPathGuide, ControlledPath

STEP, NUM, LEVEL = 0.1, 40, -1.0
COUNTS = np.random.default_rng(4).poisson(np.exp(LEVEL + np.sin(np.arange(NUM) / 6.0)))


def spikes(y):
    """Log rates that drift; nearly half of the bins are empty."""
    ou = nsde.processes.OrnsteinUhlenbeck(rate=0.5, mean=0.0, scale=1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(NUM) * STEP, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Poisson(jnp.exp(LEVEL + x)), obs=y)


def log_evidence():
    """By the forward recursion on 1,201 states; its rule is exact to rounding for smooth laws."""
    grid, kept = np.linspace(-7.0, 7.0, 1201), np.exp(-0.5 * STEP)
    move = stats.norm.pdf(grid[:, None], kept * grid[None], np.sqrt(1.0 - kept**2))
    law, total = stats.norm.pdf(grid), 0.0
    for k, count in enumerate(COUNTS):
        law = (move @ law) * (grid[1] - grid[0]) if k else law
        law = law * stats.poisson.pmf(count, np.exp(LEVEL + grid))
        mass = law.sum() * (grid[1] - grid[0])
        law, total = law / mass, total + np.log(mass)
    return total


def test_a_new_encoded_law_of_counts_is_near_the_smoothing_law(x64):
    """Importance weights of 2,000 draws: the exact evidence within 4 errors, half the draws count.

    Linearised where each bin alone points to, which for no spike is minus infinity, 0.7 per cent.
    """
    assert np.mean(COUNTS == 0) > 0.4
    guide, y = AutoPathGuide(spikes, path=ControlledPath((8,), num_context=2)), jnp.asarray(COUNTS)
    with trace() as sites, seed(rng_seed=0):
        guide(y)
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    def one(key):
        log_q, drawn = log_density(seed(guide, key), (y,), {}, params)
        return log_density(spikes, (y,), {}, {"x": drawn["x"]["value"]})[0] - log_q

    keys = jax.random.split(jax.random.key(1), 2000)
    w = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=200))(keys))
    u = np.exp(w - w.max())
    share = u.sum() ** 2 / (u**2).sum() / len(u)
    evidence, error = np.log(u.mean()) + w.max(), np.sqrt((1.0 / share - 1.0) / len(u))
    print(
        f"effective share {share:.3f}, evidence off by {evidence - log_evidence():.4f} +- {error}"
    )
    assert share > 0.3
    assert abs(evidence - log_evidence()) < 4.0 * error
