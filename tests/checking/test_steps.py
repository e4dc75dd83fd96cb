"""The parts of a check against closed forms, and the page."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.checking import CheckReport, Step
from numpyro_sde.checking.calibrated import spread_p_values
from numpyro_sde.checking.engines import Chain
from numpyro_sde.checking.fitting import CheckedFit
from numpyro_sde.checking.replicas import anatomy, doubled, simulator
from numpyro_sde.diagnostics import to_arviz

TIMES = np.array([0.0, 0.7, 1.5])


def ou_model(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.3, 0.8)
    x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    nsde.observe("y", x, lambda t, x, sd: dist.Normal(x, sd), params=sd, obs=y)


def dense_log_density(rate, sd, y):
    """The marginal law of the data of `ou_model`, by NumPy."""
    decay, still = np.exp(-rate * TIMES), 0.8**2 / (2.0 * rate)
    earlier, gap = np.minimum.outer(TIMES, TIMES), np.abs(np.subtract.outer(TIMES, TIMES))
    own = still * (1.0 - np.exp(-2.0 * rate * earlier)) * np.exp(-rate * gap)
    cov = np.outer(decay, decay) + own + sd**2 * np.eye(3)
    return stats.multivariate_normal(0.3 * (1.0 - decay), cov).logpdf(y)


@pytest.mark.parametrize("treat", [nsde.reparam.auto], ids=["integrated"])
def test_two_data_sets_have_the_density_of_both_and_the_prior_once(treat):
    y, z = np.array([0.5, -0.2, 0.9]), np.array([-0.4, 0.1, 0.3])
    both = doubled(ou_model, treat, (y,), {}, ("rate", "sd"))
    values = {"rate": jnp.float32(0.8), "sd": jnp.float32(0.4)}
    found, trace = log_density(both, ({"y": jnp.asarray(z)},), {}, values)
    prior = stats.lognorm(0.5).logpdf(0.8) + stats.halfnorm().logpdf(0.4)
    expected = prior + dense_log_density(0.8, 0.4, y) + dense_log_density(0.8, 0.4, z)
    assert float(found) == pytest.approx(expected, abs=2e-4)
    kept = [name for name, site in trace.items() if site["type"] == "sample"]
    assert sorted(kept) == ["again/y", "rate", "sd", "y"]


def test_drawn_data_are_missing_where_the_data_are():
    y = np.array([0.5, np.nan, 0.9])
    sites = anatomy(ou_model, (y,), {})
    assert (sites.parameters, sites.paths, sites.data) == (("rate", "sd"), ("x",), ("y",))
    run = simulator(ou_model, (y,), {}, sites)
    values = {"rate": jnp.float32(0.8), "sd": jnp.float32(0.4)}
    drawn = jax.vmap(lambda key: run(values, key)["y"])(jax.random.split(jax.random.key(0), 4000))
    assert np.isnan(drawn[:, 1]).all()
    # Mean at 1.5, standard error 1 / sqrt(4000) of a standard deviation below 1.1.
    assert abs(float(drawn[:, 2].mean()) - 0.3 * (1.0 - np.exp(-1.2))) < 4 * 1.1 / np.sqrt(4000)


def test_a_model_that_does_not_draw_its_data_says_so():
    def bare(y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.factor("more", -((y - a) ** 2))

    assert "bare factor 'more'" in anatomy(bare, (0.5,), {}).trouble


def conjugate(y):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(a, 2.0), obs=y)


def exact_fit(y, num=20_000):
    """A fit of `conjugate` with exact draws."""
    mean, sd = y / 5.0, np.sqrt(4.0 / 5.0)
    draws = {"a": mean + sd * np.random.default_rng(0).normal(size=num)}
    tree = to_arviz(draws, model=conjugate, model_args=(y,), log_likelihood=False)
    step, sites = Step("fit", "good", "use it"), anatomy(conjugate, (y,), {})
    treat, engine = nsde.reparam.auto, numpyro.infer.NUTS
    return CheckedFit(conjugate, (y,), {}, treat, engine, {}, sites, draws, tree, step, 1.0, 1, 0.0)


def test_powers_of_the_prior_move_the_mean_as_they_must():
    y = 3.0
    table = nsde.checking.power_scaling(exact_fit(y)).table.loc["a"]
    sd = np.sqrt(4.0 / 5.0)
    # Precision of the prior 1 to the power, of the datum 1/4 to the power.
    for name, prior, data in (
        ("prior half as strong", 0.5, 1.0),
        ("data half as strong", 1.0, 0.5),
    ):
        mean = y * (data / 4.0) / (prior + data / 4.0)
        # The standard error of 20,000 weighted draws is below 0.01 sd.
        assert table[name] == pytest.approx((mean - y / 5.0) / sd, abs=0.04)


def test_a_chain_in_pieces_is_the_same_chain():
    def run(counts):
        chain = Chain(numpyro.infer.NUTS(conjugate), 6)
        data = jnp.float32(3.0)  # y, which differs between chains
        state, pieces = chain.start(jax.random.key(0), data), []
        for count in counts:
            state, draws, _ = chain.advance(state, count, data)
            pieces.append(draws["a"])
        return chain.constrain({"a": np.concatenate(pieces)}, data)["a"]

    whole = run([20])
    assert np.ptp(whole) > 0.0
    np.testing.assert_allclose(run([1, 4, 8, 7]), whole, rtol=1e-5)


class Slow(numpyro.infer.NUTS):
    """NUTS that sleeps a quarter of a second in each iteration."""

    def sample(self, state, model_args, model_kwargs):
        state = super().sample(state, model_args, model_kwargs)

        def sleep(energy):
            time.sleep(0.25)
            return energy

        energy = state.potential_energy
        shape = jax.ShapeDtypeStruct(energy.shape, energy.dtype)
        return state._replace(potential_energy=jax.pure_callback(sleep, shape, energy))


def test_a_slow_engine_keeps_to_its_budget():
    """One refit of 400 iterations sleeps for 100 s, a warm-up of 300 for 75 s."""
    start = time.perf_counter()
    step = nsde.checking.posterior_sbc(
        replace(exact_fit(3.0), engine=Slow), time_budget=2.0, progress=False
    )
    assert (step.level, step.words) == ("not done", "a single refit did not end within 2 s")
    with pytest.raises(TimeoutError, match="of 300 warm-up iterations of chain 1"):
        nsde.checking.fit(conjugate, 3.0, engine=Slow, time_budget=2.0, progress=False)
    # Compiling is not interrupted: some seconds, more on a busy machine.
    assert time.perf_counter() - start < 60.0


def test_ranks_too_spread_are_seen():
    rng = np.random.default_rng(0)
    good = rng.uniform(size=(60, 1))
    narrow = stats.norm.cdf(1.7 * stats.norm.ppf(good))
    assert spread_p_values(good)[0] > 0.01
    assert spread_p_values(narrow)[0] < 1e-4
    scores = stats.norm.ppf(good[:, 0])
    tail = stats.chi2(60).cdf(np.sum(scores**2))
    assert spread_p_values(good)[0] == pytest.approx(2 * min(tail, 1 - tail))


def test_a_page_holds_all_of_itself(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    import pandas as pd

    table = pd.DataFrame({"mean": [1.23456]}, index=pd.Index(["<rate>"], name="parameter"))
    steps = {
        "fit": Step("fit", "good", "use it", table=table, draw=plt.figure),
        "one-step residuals": Step("one-step residuals", "bad", "serial dependence is left"),
        "sensitivity to grid": Step("sensitivity to grid", "not done", "no time"),
    }
    report = CheckReport("river", steps, None, code="x < y", about={"data": "y (3,)"})
    assert not report.ok
    assert report.verdict == "do not use it as it is: one-step residuals"
    page = report.write(tmp_path / "new" / "page.html").read_text()
    for text in (
        "Serial dependence is left",
        "&lt;rate&gt;",
        "1.23",
        "x &lt; y",
        "image/png;base64",
    ):
        assert text in page
    assert "http" not in page
    assert "<link" not in page
    assert ">parameter<" not in page  # it would have a row of its own, empty otherwise
    assert page.count("--none:") == page.count("--ground:") == 2  # both schemes have every colour
    assert "[FAILED] one-step residuals" in str(report)
    assert "river" in report._repr_html_()


def test_bad_arguments_name_themselves():
    marginal = nsde.handlers.marginalize(ou_model, method=nsde.filters.Kalman())
    with pytest.raises(ValueError, match="model is treated already"):
        nsde.check(marginal, np.zeros(3))
    with pytest.raises(ValueError, match="time_budget must be a positive"):
        nsde.check(ou_model, np.zeros(3), time_budget=0.0)
    with pytest.raises(TypeError, match="engine must be a function"):
        nsde.check(ou_model, np.zeros(3), engine="NUTS")
    with pytest.raises(TypeError, match="engine must make of a model"):
        nsde.check(ou_model, np.zeros(3), engine=lambda model: 3.0)
