"""Random effects: one law, centred or not, with covariates; through handlers and samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

import numpyro_sde as nsde

COVARIATES = np.array([[0.2, -1.0], [0.0, 0.5], [-0.4, 0.1]])
COEFFICIENTS = np.array([0.7, -0.2])


def model(link="log", centred=False):
    with numpyro.plate("subject", 3):
        return nsde.random_effects(
            "k", 0.3, 0.5, COVARIATES, COEFFICIENTS, link=link, centred=centred
        )


@pytest.mark.parametrize(
    ("link", "inverse"),
    [("log", np.exp), ("identity", lambda v: v), ("logit", lambda v: 1 / (1 + np.exp(-v)))],
)
def test_values(link, inverse):
    eta = np.array([0.1, -1.0, 2.0])
    trace = numpyro.handlers.trace(
        numpyro.handlers.substitute(model, data={"k_eta": jnp.asarray(eta)})
    ).get_trace(link)
    expected = inverse(0.3 + COVARIATES @ COEFFICIENTS + 0.5 * eta)
    np.testing.assert_allclose(trace["k"]["value"], expected, rtol=1e-5)
    assert trace["k"]["type"] == "deterministic"


def test_centred_is_the_same_law():
    effect = np.array([0.1, 0.4, -0.3])
    data = {"k_effect": jnp.asarray(effect)}
    density, _ = numpyro.infer.util.log_density(model, (), {"centred": True}, data)
    expected = norm.logpdf(effect, 0.3 + COVARIATES @ COEFFICIENTS, 0.5).sum()
    assert float(density) == pytest.approx(expected, rel=1e-5)


def test_several_plates_broadcast():
    """A mean for each clinic, an effect for each of its patients."""

    def nested():
        with numpyro.plate("clinic", 2):
            mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
            with numpyro.plate("patient", 4, dim=-2):
                return nsde.random_effects("k", mean, 0.2)

    assert numpyro.handlers.seed(nested, jax.random.key(0))().shape == (4, 2)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="link must be one of"):
        nsde.random_effects("k", 0.0, 1.0, link="probit")
    with pytest.raises(ValueError, match="coefficients is missing"):
        nsde.random_effects("k", 0.0, 1.0, COVARIATES)
    with pytest.raises(ValueError, match="covariates has 2 columns, coefficients 3"):
        nsde.random_effects("k", 0.0, 1.0, COVARIATES, np.zeros(3))
