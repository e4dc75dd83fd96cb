"""Models judged by prediction: interest rates, closed forms, what is said and what is refused."""

from typing import NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, init_to_value
from scipy.optimize import minimize
from scipy.special import logsumexp

import numpyro_sde as nsde
from numpyro_sde.diagnostics import LeaveFutureOut, compare_fits, compare_models, to_arviz
from numpyro_sde.diagnostics.compare.arviz_compat import stacking_weights
from numpyro_sde.diagnostics.compare.model_names import describe_model

TIMES, RATE = nsde.datasets.load_us_tbill()


def short_rate(kind):
    """The three short-rate models, with one prior for what they have in common."""
    rate = numpyro.sample("rate", dist.LogNormal(-2.0, 1.0))
    mean = numpyro.sample("mean", dist.LogNormal(1.5, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 1.0))
    scheme = None
    if kind == "vasicek":
        sde = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    elif kind == "cir":
        sde = nsde.processes.CoxIngersollRoss(rate, mean, scale)
    else:
        power = numpyro.sample("power", dist.Normal(1.0, 0.5))
        sde = nsde.processes.CKLS(rate, mean, scale, power)
        scheme = nsde.schemes.Kessler()
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, RATE[0], scheme=scheme), obs=RATE)


STARTS = {
    "vasicek": {"rate": 0.17, "mean": 5.0, "scale": 1.76},
    "cir": {"rate": 0.1, "mean": 4.0, "scale": 0.67},
    "ckls": {"rate": 0.1, "mean": 4.0, "scale": 0.4, "power": 0.9},
}


@pytest.fixture(scope="module")
def rates():
    fits = {}
    for k, (kind, start) in enumerate(STARTS.items()):
        kernel = NUTS(short_rate, init_strategy=init_to_value(values=start))
        mcmc = MCMC(kernel, num_warmup=200, num_samples=400, progress_bar=False)
        mcmc.run(jax.random.key(k), kind)
        fits[kind] = to_arviz(mcmc)
    return fits


@pytest.mark.slow
def test_short_rates_are_judged_by_prediction(rates):
    """Maximum log likelihoods are -256.52 (Vasicek) and -214.49 (CIR), see the data set."""
    found = compare_models(rates, parameters=["scale", "power"])
    assert list(found.models.index) == ["ckls", "cir", "vasicek"]
    elpd = found.models["elpd"]
    # Leave-one-out takes off about one for each of three parameters.
    assert -256.5 - 8 < elpd["vasicek"] < -256.5
    assert -214.5 - 8 < elpd["cir"] < -214.5
    assert found.models.loc["ckls", "weight"] > 0.5
    assert found.verdicts["ckls"].startswith("predicts best")
    assert found.verdicts["vasicek"].startswith("predicts worse by")
    # Short chains may be told to be short; parameters of two models are never told to differ.
    assert "away from" not in "".join(found.verdicts.values())
    assert ("scale", "cir") in found.parameters.index
    assert "power" in str(found)
    assert found.models.loc["cir", "num_points"] == len(TIMES) - 1


@pytest.mark.slow
def test_compare_fits_knows_that_models_differ(rates):
    found = compare_fits(rates)
    assert "another model than vasicek" in found.verdicts["cir"]
    assert "compare_models" in found.verdicts["cir"]
    assert "away from" not in found.verdicts["cir"]
    assert np.isnan(found.parameters.loc[("scale", "cir"), "distance"])
    asked = compare_fits(rates, var_names=["scale"])
    assert np.isfinite(asked.parameters.loc[("scale", "cir"), "distance"])


def test_stacking_is_the_best_mixture():
    rng = np.random.default_rng(0)
    points = {"a": rng.normal(-700.0, 1.0, 60), "b": rng.normal(-700.0, 1.0, 60)}
    weights = stacking_weights(points)
    both = np.stack(list(points.values()))

    def loss(w):
        return -logsumexp(both.T + np.log([w[0], 1 - w[0]]), axis=1).sum()

    best = minimize(loss, [0.5], bounds=[(1e-6, 1 - 1e-6)]).x[0]
    assert weights["a"] == pytest.approx(best, abs=1e-3)


def lfo_result(points, khat=0.3, origins=None):
    size = len(points)
    origins = np.arange(float(size)) if origins is None else origins
    return LeaveFutureOut(points, origins, np.full(size, khat), np.array([0]), 1, 400)


def test_bayes_factors_with_their_errors():
    points = np.random.default_rng(3).normal(-1.0, 0.5, size=120)

    class Found(NamedTuple):  # what nsde.evidence returns has these
        log_evidence: float
        error: float

    fits = {"a": lfo_result(points), "b": lfo_result(points - 0.01), "c": lfo_result(points)}
    known = {"a": Found(-50.0, 0.3), "b": Found(-50.4, 0.4), "c": (-61.0, 0.0)}
    found = compare_models(fits, log_evidence=known)
    assert found.models.loc["b", "log_bayes_factor"] == pytest.approx(-0.4)
    assert found.models.loc["b", "log_bayes_factor_se"] == pytest.approx(0.5)
    assert found.verdicts["b"].endswith("less by 0.4 (se 0.5), which is not certain")
    assert found.verdicts["c"].endswith("less by 11.0 (se 0.3)")


def test_verdicts_of_leave_future_out():
    base = np.random.default_rng(1).normal(-1.0, 0.5, size=120)
    noise = np.random.default_rng(2).normal(0.0, 1.0, size=120)
    found = compare_models(
        {
            "best": lfo_result(base),
            "alike": lfo_result(base - 0.01),
            "unsure": lfo_result(base - 0.1 + noise - noise.mean()),
            "worse": lfo_result(base - 0.5, khat=0.9),
        },
        log_evidence={"best": (-120.0, 0.2), "worse": -131.5},
    )
    assert found.by == "lfo"
    assert found.verdicts["best"] == "predicts best; largest evidence"
    assert found.verdicts["alike"].startswith("predicts as well as best")
    assert found.verdicts["unsure"].endswith("which is not certain")
    assert "worse by 60 (se 0.0)" in found.verdicts["worse"]
    assert "log evidence less by 11.5" in found.verdicts["worse"]
    factors = found.models["log_bayes_factor"]
    assert factors["best"] == 0.0
    assert factors["worse"] == -11.5
    assert np.isnan(factors["alike"])
    assert "not to be trusted: 120 of 120 k-hats" in found.verdicts["worse"]
    few = compare_models({"a": lfo_result(base[:20]), "b": lfo_result(base[:20] - 1.0)})
    assert "of 20 points the error is rough" in few.verdicts["b"]


def test_a_verdict_that_rests_on_bad_khats_says_so():
    points = np.full(120, -1.0)
    khat = np.where(np.arange(120) < 2, 0.9, 0.3)  # of the model that seems better
    jump = np.where(np.arange(120) < 2, -20.0, 0.0)

    def result(points, khat):
        return LeaveFutureOut(points, np.arange(120.0), khat, np.array([0]), 1, 400)

    good = np.full(120, 0.3)
    found = compare_models({"a": result(points, khat), "b": result(points + jump, good)})
    assert found.verdicts["a"].startswith("seems to predict best")
    assert "seems to predict worse by 40" in found.verdicts["b"]
    assert "rests on 2 points" in found.verdicts["b"]
    assert "by 0.0 without them" in found.verdicts["b"]
    # Elsewhere the same points decide nothing, and those of the worse model flatter it only.
    for difference, other in ((np.full(120, -0.5), khat), (jump - 0.5, good)):
        found = compare_models(
            {"a": result(points, other), "b": result(points + difference, 1.2 - good)}
        )
        assert found.verdicts["a"].startswith("predicts best")
        assert found.verdicts["b"].startswith("predicts worse by")
    # Two alike, one of which is flattered.
    found = compare_models({"a": result(points, good), "b": result(points - 0.01, 1.2 - good)})
    assert found.verdicts["b"].startswith("seems to predict as well as a")


def test_bad_khats_enter_every_verdict():
    """A latent path of single observations: LOO of its draws is known to fail."""
    rng = np.random.default_rng(3)
    times, y = np.arange(12.0), 3.0 * rng.normal(size=12)

    def model():
        numpyro.sample("a", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(5.0, 0.0, 10.0)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, 3.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    draws = {"a": rng.normal(size=500), "x": y + 0.1 * rng.normal(size=(500, 12))}
    tree = to_arviz(draws, model=model)
    assert "k-hats of LOO are bad" in compare_fits({"latent": tree}).verdicts["latent"]
    verdict = compare_models({"latent": tree}).verdicts["latent"]
    assert "its elpd is not to be trusted" in verdict
    assert "lfo" in verdict


def test_refusals():
    points = np.full(30, -1.0)
    with pytest.raises(ValueError, match="all results of lfo or none"):
        compare_models({"a": lfo_result(points), "b": {"rate": np.ones(10)}})
    with pytest.raises(ValueError, match="same origins and horizon"):
        compare_models({"a": lfo_result(points), "b": lfo_result(points[:20])})
    with pytest.raises(ValueError, match="no log likelihood"):
        compare_models({"a": {"rate": np.ones(10)}})
    with pytest.raises(ValueError, match="log_evidence names"):
        compare_models({"a": lfo_result(points)}, log_evidence={"b": 0.0})

    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("i", 5):
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)

    draws = {"level": np.random.default_rng(0).normal(size=50)}
    trees = {
        n: to_arviz(draws, model=model, model_args=(np.full(5, v),))
        for n, v in {"a": 0.0, "b": 1.0}.items()
    }
    with pytest.raises(ValueError, match="same data: 'y' of 'b'"):
        compare_models(trees)


def test_names_of_models():
    def make(kind):
        def model(y):
            return kind, y

        return model

    config = {"x": nsde.reparam.InnovationReparam()}
    plain = describe_model(make("cir"), (np.zeros(3),), {})
    treated = numpyro.handlers.reparam(make("cir"), config=config)
    assert plain == describe_model(treated, (np.ones(3),), {})
    assert plain != describe_model(make("ckls"), (np.zeros(3),), {})
