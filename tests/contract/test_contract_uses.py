"""The same models in use: predictions, precision, transformations, random keys."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from engines import B, prior
from known_failures import KNOWN_FAILURES
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.testing.ways import SD, Y3, level, ou, ou_truth, seen

NAMED = {case.name: case for case in CASES}
KALMAN, PARTICLE = nsde.filters.Kalman(), nsde.filters.Particle(50)
TREATED = {
    "centred": lambda model: model,
    "whitened": lambda model: handlers.reparam(model, {"x": nsde.reparam.InnovationReparam()}),
    "guided": lambda model: handlers.reparam(model, {"x": nsde.reparam.GuidedReparam()}),
    "Kalman": lambda model: nsde.handlers.marginalize(model, method=KALMAN),
    "Particle": lambda model: nsde.handlers.marginalize(model, method=PARTICLE),
}


def cells(use, treatments):
    for name in treatments:
        reason = KNOWN_FAILURES.get((name, use))
        yield pytest.param(
            name, marks=[pytest.mark.xfail(strict=True, reason=reason)] if reason else [], id=name
        )


def two_gauges(y=None):
    x = ou(level())
    with numpyro.plate("gauges", 2):
        seen(x, y)


def at_zero():
    seen(ou(level()), None)


def moments_of_data():
    """Mean and covariance of the path at `b = B`: data are it plus noise."""
    return ou_truth()(B).moments()


@pytest.mark.parametrize("name", list(cells("prior predictive of instruments", TREATED)))
def test_instruments_share_their_path_in_predictions(name):
    """4,000 prior draws of two gauges: covariances between them are those of the path."""
    model = handlers.condition(TREATED[name](two_gauges), {"b": B})
    draws = np.asarray(Predictive(model, num_samples=4000)(jax.random.key(1))["y"])
    assert draws.shape == (4000, 2, 3)
    mean, cov = moments_of_data()
    both = np.block([[cov + SD**2 * np.eye(3), cov], [cov, cov + SD**2 * np.eye(3)]])
    flat, sd = draws.reshape(4000, 6), np.sqrt(np.diag(both))
    np.testing.assert_array_less(np.abs(flat.mean(0) - np.tile(mean, 2)), 4 * sd / np.sqrt(4000))
    error = np.sqrt((np.outer(sd, sd) ** 2 + both**2) / 4000)
    np.testing.assert_array_less(np.abs(np.cov(flat.T) - both), 4 * error)


@pytest.mark.parametrize("name", list(cells("do in predictions", TREATED)))
def test_an_intervention_reaches_predictions(name):
    """With the path set to 2 by `do`, data have mean 2 and the noise's spread (1,000 draws)."""
    model = handlers.do(TREATED[name](at_zero), {"x": jnp.full(3, 2.0)})
    try:
        draws = np.asarray(Predictive(model, num_samples=1000)(jax.random.key(2))["y"])
    except (TypeError, ValueError, NotImplementedError) as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert re.search(r"\bdo\b|interv", refusal), refusal
        return
    np.testing.assert_array_less(np.abs(draws.mean(0) - 2.0), 4 * SD / np.sqrt(1000))
    np.testing.assert_array_less(np.abs(draws.std(0) - SD), 4 * SD / np.sqrt(2000))


@pytest.mark.parametrize("way", ["plain", "two instruments", "vector, missing in part"])
@pytest.mark.parametrize("name", ["centred", "Kalman"])
def test_float32_is_float64_to_four_digits(name, way):
    case = NAMED[way]
    model = TREATED[name](case.model)
    x = np.random.default_rng(0).normal(size=case.shape)
    values = {"b": B} if name == "Kalman" else {"b": B, "x": x.astype(np.float32)}
    got = jax.jit(lambda: log_density(handlers.seed(model, 0), case.args, {}, values)[0])()
    assert got.dtype == jnp.float32
    want = prior() + (case.evidence(B) if name == "Kalman" else case.truth(B).at(x))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Kalman", "centred"])
def test_vmap_and_no_jit(name, x64):
    """Densities at several levels at once, and one by one without `jit`."""
    case = NAMED["two instruments"]
    model, x = TREATED[name](case.model), jnp.zeros(3)

    def density(b):
        values = {"b": b} if name == "Kalman" else {"b": b, "x": x}
        return log_density(handlers.seed(model, 0), (), {}, values)[0]

    levels = np.array([-1.0, 0.4, 2.0])
    want = [
        prior(b) + (case.evidence(b) if name == "Kalman" else case.truth(b).at(x)) for b in levels
    ]
    np.testing.assert_allclose(jax.vmap(density)(levels), want, rtol=1e-9)
    np.testing.assert_allclose(density(levels[0]), want[0], rtol=1e-9)


def test_data_of_one_gauge_in_a_plate_of_replicates_with_data_as_argument():
    """The same compiled density takes other data of the same shape."""
    model = nsde.handlers.marginalize(lambda y: seen(ou(level()), y), method=KALMAN)
    density = jax.jit(lambda y: log_density(handlers.seed(model, 0), (y,), {}, {"b": B})[0])
    for y in (Y3[0], Y3[1], np.array([np.nan, 0.1, np.nan])):
        want = prior() + ou_truth({"y": y})(B).evidence()
        np.testing.assert_allclose(density(y), want, rtol=1e-5)


def particle_density(seeding, method=PARTICLE):
    model = nsde.handlers.marginalize(NAMED["plain"].model, method=method)
    return float(log_density(seeding(model), (), {}, {"b": B})[0])


@pytest.mark.slow
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["new", "old"])
def test_the_seed_handler_decides_the_particles(make):
    bootstrap = nsde.filters.Particle(50, proposal="bootstrap")
    got = [
        particle_density(lambda m, k=k: handlers.seed(m, make(k)), bootstrap) for k in (0, 0, 1, 2)
    ]
    assert got[0] == got[1]
    assert len(set(got)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["new", "old"])
def test_keys_of_both_kinds_as_an_option(make):
    method = nsde.filters.Particle(50, key=make(0))
    want = prior() + NAMED["plain"].evidence(B)
    assert abs(particle_density(lambda m: m, method) - want) < 1.0


@pytest.mark.slow
def test_a_missing_row_of_a_second_instrument_has_no_pointwise_term(x64):
    model = nsde.handlers.marginalize(NAMED["two instruments"].model, method=KALMAN)
    sites = handlers.trace(handlers.seed(handlers.condition(model, {"b": B}), 0)).get_trace()
    terms = np.concatenate(
        [np.asarray(sites[n]["fn"].log_prob_pointwise(sites[n]["value"])) for n in ("y", "z")]
    )
    missing = np.isnan(np.concatenate([np.asarray(sites[n]["value"]) for n in ("y", "z")]))
    np.testing.assert_array_equal(terms[missing], 0.0)
    np.testing.assert_allclose(terms.sum(), NAMED["two instruments"].evidence(B), rtol=1e-9)


def test_pointwise_terms_of_gauges_given_the_path(x64):
    """Given the path, a gauge's terms are its own normal densities."""
    tree = nsde.diagnostics.to_arviz(
        {"b": np.full(2, B), "x": np.zeros((2, 3))}, model=two_gauges, model_args=(Y3[:2],)
    )
    got = tree["log_likelihood"]["y"].values[0, 0]
    want = dist.Normal(0.0, SD).log_prob(Y3[:2])
    np.testing.assert_allclose(got, want, rtol=1e-9)
