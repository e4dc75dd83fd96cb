"""A model read once: paths, statements, and what stands around them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import numpyro_sde as nsde
from numpyro_sde.models.reading import read_model
from numpyro_sde.models.survey import survey

TIMES = np.array([0.0, 1.0, 1.5])
Y = np.array([0.3, 0.4, 1.0])


def law():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
    return nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0))


def normal(t, x):
    return dist.Normal(x, 0.2)


def test_statements_come_with_data_masks_scales_and_instruments():
    def model(y, y3):
        x = numpyro.sample("x", law())
        nsde.observe("whole", x, normal, obs=y)
        nsde.observe("some", x, normal, obs=y[:2], at=[2, 0])
        with numpyro.plate("gauge", 3), handlers.mask(mask=np.array([True, False, True])):
            nsde.observe("gauges", x, normal, obs=y3)
        with handlers.scale(scale=0.5):
            nsde.observe("half", 2.0 * x, normal, obs=y)
        nsde.observe("unseen", x, normal)

    y3 = np.arange(9.0).reshape(3, 3)
    reading = read_model(model, (Y, y3), {})
    (whole, data), (some, _), (gauges, data3), (half, _) = reading.observed["x"].data
    np.testing.assert_array_equal(data, Y)
    np.testing.assert_array_equal(some.rows.index, [2, 0])
    assert (whole.power, whole.view, whole.replicates) == (None, None, ())
    assert gauges.replicates == (3,)
    np.testing.assert_array_equal(np.isnan(data3).any(1), [False, True, False])
    assert float(half.power) == 0.5
    assert float(half.view.apply(jnp.array(1.5), [c[0] for c in half.view.on_grid(3)])) == 3.0


def test_subsampling_of_a_plate_around_the_path_is_no_power():
    def model(y):
        with numpyro.plate("series", 4, subsample_size=2):
            x = numpyro.sample("x", law())
            nsde.observe("y", x, normal, obs=y)
            with numpyro.plate("gauge", 6, subsample_size=3):
                nsde.observe("z", x, normal, obs=jnp.zeros((3, 2, 3)))

    (y, _), (z, data) = read_model(model, (np.zeros((2, 3)),), {}).observed["x"].data
    assert y.power is None
    np.testing.assert_allclose(z.power, 2.0 * np.ones((2, 3)))
    assert data.shape == (2, 3, 3)  # series, gauges of each, times


def test_a_survey_tells_who_uses_a_path():
    def model():
        hidden = numpyro.sample("hidden", law())
        x = numpyro.sample("x", nsde.SDEPath(law().sde, TIMES, dist.Normal(hidden[-1], 1.0)))
        numpyro.deterministic("last", x[-1])
        nsde.observe("y", x, normal)
        nsde.observe("twice", 2.0 * x, normal)
        numpyro.factor("bonus", jnp.sum(x**2))
        return x, hidden

    found = survey(model, (), {})
    assert found.observed == {"y": "x", "twice": "x"}
    assert found.transformed == {"x": {"twice"}}
    assert found.densities == {"hidden": ["x"], "x": ["bonus"]}
    assert found.values == {"x": ["last"]}
    assert found.returned == {"x": [True, False]}
    with pytest.raises(ValueError, match="'x' in \\['bonus'\\]"):
        found.refuse_other_uses()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda x, v: x - x.mean(), "operation reduce_sum is not one on each time apart"),
        (lambda x, v: x + v, "made of several paths"),
    ],
)
def test_what_cannot_be_attributed_is_an_error_that_names_the_site(state, message):
    def model(y):
        x, v = numpyro.sample("x", law()), numpyro.sample("v", law())
        nsde.observe("y", state(x, v), normal, obs=y)

    with pytest.raises(ValueError, match=f"observe\\('y'\\).*{message}"):
        read_model(model, (Y,), {})


def test_parameters_of_an_emission_may_not_depend_on_the_path():
    def model(y):
        x = numpyro.sample("x", law())
        scale = jnp.exp(x.mean())
        nsde.observe("y", 2.0 * x, lambda t, x, p: dist.Normal(x, p), params=scale, obs=y)

    for read in (read_model, survey):
        with pytest.raises(ValueError, match=r"observe\('y'\): its params.* depend on path 'x'"):
            read(model, (Y,), {})


def test_marginalize_takes_what_the_model_makes_of_a_path():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", law())
        nsde.observe("y", a * x + 1.0, normal, obs=y)
        return x, a

    def same(y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", law())
        nsde.observe("y", x, lambda t, x, p: dist.Normal(p * x + 1.0, 0.2), params=a, obs=y)

    method = nsde.filters.Kalman()
    made = nsde.handlers.marginalize(model, method=method)
    given = {"a": jnp.array(1.7)}
    densities = [
        handlers.trace(handlers.seed(handlers.condition(m, data=given), 0)).get_trace(Y)["y"]
        for m in (made, nsde.handlers.marginalize(same, method=method))
    ]
    got, want = (site["fn"].log_prob(site["value"]) for site in densities)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    path, a = handlers.seed(made, 0)(Y)
    assert jnp.ndim(a) == 0
    with pytest.raises(TypeError, match="path 'x' is integrated out"):
        path + 1.0
    fixed = handlers.condition(made, data=given)

    def draw(key):
        return handlers.trace(handlers.seed(fixed, key)).get_trace(None)["y"]["value"]

    first = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 200)))[:, 0]
    # Variance 1.7^2 + 0.04 and mean 1 at the start: 4 standard errors.
    assert abs(first.mean() - 1.0) < 4 * np.sqrt(2.93 / 200)
    assert abs(first.var() / 2.93 - 1.0) < 4 * np.sqrt(2.0 / 200)
