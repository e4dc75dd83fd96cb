"""Conditional SMC keeps the smoothing law: 1e5 transitions from exact draws of it."""

import jax
import numpy as np
import pytest
from particle_models import Y, exact, on_model, ou_path, setting

from numpyro_sde.smc.conditional import conditional_smc

NUM = 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fine", "num_particles", "proposal", "scheme", "threshold", "renewal"),
    [
        pytest.param(False, 3, "bootstrap", "systematic", 1.0, "none", marks=pytest.mark.slow),
        (True, 2, "guided", "systematic", 1.0, "backward"),
        pytest.param(True, 3, "bootstrap", "killing", 0.9, "backward", marks=pytest.mark.slow),
        *[
            pytest.param(fine, 3, proposal, scheme, 1.0, renewal, marks=pytest.mark.slow)
            for fine in (False, True)
            for proposal in ("bootstrap", "guided")
            for scheme in ("stratified", "residual", "multinomial", "ssp", "killing")
            for renewal in ("none", "backward", *(("ancestor",) if not fine else ()))
        ],
    ],
)
def test_smoothing_law_is_invariant(fine, num_particles, proposal, scheme, threshold, renewal, x64):
    truth = exact(fine)
    mean, cov = (np.asarray(a) for a in truth.smooth())
    mean, sd = mean[:, 0], np.sqrt(cov[:, 0, 0])
    start = truth.sample(jax.random.key(5), NUM)
    keys = jax.random.split(jax.random.key(6), NUM)
    chosen = setting(num_particles, proposal, scheme, threshold)
    path, at = ou_path(fine)

    def run(model):
        def one(inputs):
            sweep = conditional_smc(model, chosen, inputs[1], inputs[0], renewal=renewal)
            return sweep.path[:, 0], sweep.renewed

        return jax.lax.map(one, (keys, start), batch_size=2000)

    new, renewed = (np.asarray(a) for a in jax.jit(lambda: on_model(path, at, Y, run))())
    z = (new - mean) / sd
    # Means, variances and lag-one products: sums of 1e5 independent terms.
    assert np.max(np.abs(z.mean(0))) * np.sqrt(NUM) < 4
    assert np.max(np.abs((z**2).mean(0) - 1.0)) * np.sqrt(NUM / 2) < 4
    before = (np.asarray(start)[..., 0] - mean) / sd
    products, wanted = z[:, 1:] * z[:, :-1], before[:, 1:] * before[:, :-1]
    error = np.sqrt((products.var(0) + wanted.var(0)) / NUM)
    assert np.max(np.abs(products.mean(0) - wanted.mean(0)) / error) < 4
    share = renewed.mean(0)
    # Along the ancestors alone lines merge, the sooner the more random the resampling: only the
    # last state is sure to change often.
    assert (share[-1] if renewal == "none" else share.min()) > 0.35
