"""Likelihoods of published epidemics by particles, beside independent programs."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps import epidemics
from jumps.references import REFERENCE
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.infer.likelihood_fit import log_mean_exp


def estimates(model, num_particles, num_runs, proposal="bootstrap"):
    """Log likelihoods by filters that resample at each datum, seeds 0, 1, ..."""

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(num_particles, proposal=proposal, ess_threshold=1.0, key=key)
        return log_density(nsde.handlers.marginalize(model, method=method), (), {}, {})[0]

    return np.array([float(run(jax.random.key(k))) for k in range(num_runs)])


def cholera(num_months, num_particles, num_runs):
    path, wide, deaths = epidemics.cholera_law(num_months)
    rows = epidemics.STEPS * np.arange(1, num_months + 1)

    def model():
        x = numpyro.sample("x", path)
        nsde.observe(
            "deaths",
            x,
            lambda t, x, acc: epidemics.reported(acc["deaths"]),
            obs=deaths,
            accumulated=wide,
            at=rows,
        )

    return log_mean_exp(estimates(model, num_particles, num_runs))


def test_the_seasonal_basis_is_a_partition_of_one():
    basis = epidemics.seasonal_basis(1891.0 + np.linspace(0.0, 2.0, 97))
    np.testing.assert_allclose(basis.sum(1), 1.0, rtol=1e-12)
    # As pomp's covariates of 1891 have it.
    np.testing.assert_allclose(
        basis[0], [0.479167, 0.020833, 0.0, 0.0, 0.020833, 0.479167], atol=1e-6
    )


def test_cholera_to_1893(x64):
    ref = REFERENCE["dacca"]["window_24_months"]
    value, error = cholera(24, 1000, 20)
    assert error < 0.1
    assert abs(value - ref["loglik"]) < 4.0 * np.hypot(error, ref["se"])


@pytest.mark.slow
def test_cholera_of_fifty_years(x64):
    reference, reference_error = REFERENCE["dacca"]["full_600"]["logmeanexp"]
    value, error = cholera(600, 1500, 20)
    print(f"600 months: {value:.2f} ({error:.2f}), reference {reference:.2f}")
    assert abs(value - reference) < 4.0 * np.hypot(error, reference_error)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_influenza_in_a_boarding_school(x64, number):
    # Four published rows of parameters; the first has been filtered with 1e5 particles as well.
    row = REFERENCE["bsflu"]["rows"][number]
    reference, size, runs, errors = [row["loglik"], row["se"]], 20_000, 12, 4.0
    if number == 0:
        reference = REFERENCE["particle_repeats"]["bsflu_row1_J1e5"]["logmeanexp"]
        size, runs, errors = 50_000, 16, 2.0
    elif number == 2:
        # Far from the maximum: with 20,000 particles the error is 1.2, and the reference run's own
        # (-88.69, 2 nats below ours with 120,000) is too small. The published value has its error.
        reference, size = [row["published"], row["published_se"]], 120_000
    y = np.append(np.nan, epidemics.FLU.confined)

    def model():
        x = numpyro.sample("x", epidemics.flu_path(row["Beta"], row["mu_I"]))
        nsde.observe("y", x, lambda t, x: dist.Poisson(row["rho"] * x[2] + 1e-6), obs=y)

    value, error = log_mean_exp(estimates(model, size, runs, "auxiliary"))
    assert error < (0.25 if number == 0 else 0.6)
    print(f"influenza {number}: {value:.2f} ({error:.2f}), reference {reference[0]:.2f}")
    assert abs(value - reference[0]) < errors * np.hypot(error, reference[1])
