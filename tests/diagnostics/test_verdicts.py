"""Verdicts on fits whose faults are known, by draws of known laws."""

import numpy as np
import pytest

from numpyro_sde.diagnostics import compare_fits
from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset, make_tree
from numpyro_sde.diagnostics.compare.verdicts import Evidence, differing, variational_verdict

RNG = np.random.default_rng(0)
GOOD = {"rate": RNG.normal(size=(4, 500)), "scale": RNG.normal(size=(4, 500))}


def chains(draws, divergences=0, method="mcmc", statistics=None):
    """An ArviZ object of scalars, shape `(chain, draw)`."""
    shape = next(iter(draws.values())).shape
    diverging = np.arange(np.prod(shape)).reshape(shape) < divergences
    statistics = {"diverging": diverging} if statistics is None else statistics
    groups = {
        name: make_dataset(
            {k: (("chain", "draw"), v) for k, v in values.items()}, {}, {"method": method}
        )
        for name, values in (("posterior", draws), ("sample_stats", statistics))
    }
    return make_tree(groups)


def guide(draws, log_weights):
    """A variational fit with given log weights."""
    values = {"log_p": log_weights[None], "log_q": np.zeros((1, len(log_weights)))}
    return chains({k: v[None] for k, v in draws.items()}, 0, "variational", values)


def verdicts(**fits):
    return compare_fits(fits).verdicts


def draws_of(size=2000, **means):
    return {name: mean + RNG.normal(size=size) for name, mean in means.items()}


def test_good_chains():
    assert verdicts(NUTS=chains(GOOD)) == {"NUTS": "use it"}
    text = verdicts(NUTS=chains(GOOD, divergences=3))["NUTS"]
    assert text == "use it; look where its 3 divergences are"


def test_chains_that_disagree_name_the_parameter():
    apart = {"rate": GOOD["rate"], "scale": GOOD["scale"] + np.array([[0.0], [0.0], [1.0], [1.0]])}
    text = verdicts(NUTS=chains(apart))["NUTS"]
    assert text.startswith("do not trust these parameters: scale (R-hat 1.")
    assert "rate" not in text


def test_chains_that_diverge():
    text = verdicts(NUTS=chains(GOOD, divergences=50))["NUTS"]
    assert text.startswith("do not trust these parameters: rate, scale; 50 of 2000")


def path_chains(x, **attrs):
    """An ArviZ object of one path, `(chain, draw, time)`."""
    dims = ("chain", "draw", "time")
    attrs = {"method": "mcmc", **attrs}
    return make_tree({"posterior": make_dataset({"x": (dims, x)}, {}, attrs)})


def test_the_side_of_a_path_is_judged():
    rng = np.random.default_rng(5)
    x = 0.1 * rng.normal(size=(4, 500, 6))
    free = x.copy()
    free[..., 2] += np.where(rng.random((4, 500)) < 0.5, 1.0, -1.0)
    assert verdicts(NUTS=path_chains(free)) == {"NUTS": "use it"}
    # Changes of side every fifty draws: R-hat of the states is 1.1 or so, the side has 40 changes.
    slow = x.copy()
    slow[..., 2] += np.repeat(np.where(rng.random((4, 10)) < 0.5, 1.0, -1.0), 50, axis=1)
    text = verdicts(NUTS=path_chains(slow))["NUTS"]
    assert text.startswith("do not trust these parameters: ")
    assert "which side x is on (R-hat" in text
    # A heavy tail is no side.
    assert verdicts(NUTS=path_chains(x**3)) == {"NUTS": "use it"}


def test_a_guide_that_covers_little_is_told():
    x = 0.1 * np.random.default_rng(6).normal(size=(4, 500, 6))
    poor = {"engine": "SplitNUTS", "guide_efficiency": 0.01, "guide_khat": 0.9}
    found = compare_fits({"NUTS": path_chains(x, **poor)})
    assert found.verdicts["NUTS"].startswith("check it by another engine: the guide covers little")
    assert found.fits.loc["NUTS", "guide_efficiency"] == 0.01
    good = {**poor, "guide_efficiency": 0.3, "guide_khat": 0.4}
    assert verdicts(NUTS=path_chains(x, **good)) == {"NUTS": "use it"}
    # A sound fit by another engine agrees, or does not.
    other = path_chains(0.1 * np.random.default_rng(7).normal(size=(4, 500, 6)))
    both = verdicts(PMMH=other, NUTS=path_chains(x, **poor))
    assert both == {"PMMH": "use it", "NUTS": "use it"}
    apart = verdicts(PMMH=other, NUTS=path_chains(x + 0.2, **poor))
    assert apart["NUTS"].startswith("do not trust these parameters: x")


def test_a_tempered_run_is_judged_by_its_report():
    x = 0.1 * np.random.default_rng(8).normal(size=(1, 2000, 6))
    told = {"engine": "Tempered", "log_evidence": -3.0, "round_trips": 9}
    bad = path_chains(x, tempering_complaints="9 round trips, 50 are needed", **told)
    found = compare_fits({"tempered": bad})
    assert found.verdicts["tempered"] == "do not trust its modes: 9 round trips, 50 are needed"
    assert found.fits.loc["tempered", "log_evidence"] == -3.0
    sound = path_chains(x, tempering_complaints="", **told)
    assert verdicts(tempered=sound) == {"tempered": "use it"}


def test_short_chains():
    text = verdicts(NUTS=chains({k: v[:, :60] for k, v in GOOD.items()}))["NUTS"]
    assert text.startswith("use it; run it longer for more than means: rate")
    text = verdicts(NUTS=chains({k: v[:, :20] for k, v in GOOD.items()}))["NUTS"]
    assert text.startswith("do not trust these parameters: rate")


def test_a_chain_that_never_moved():
    stuck = {"rate": np.zeros((4, 500)), "scale": GOOD["scale"]}
    text = verdicts(NUTS=chains(GOOD), other=chains(stuck))["other"]
    assert text.startswith("do not trust these parameters: rate")


def test_a_single_chain_is_judged_by_its_halves():
    drifting = {"rate": np.linspace(0.0, 3.0, 1000)[None] + RNG.normal(size=(1, 1000))}
    assert verdicts(NUTS=chains(drifting))["NUTS"].startswith("do not trust these parameters: rate")


def test_two_sound_chains_that_differ():
    other = {"rate": RNG.normal(size=(4, 500)), "scale": 0.3 + RNG.normal(size=(4, 500))}
    found = verdicts(NUTS=chains(GOOD), other=chains(other))
    assert found["NUTS"] == "use it"
    assert found["other"].startswith("do not trust these parameters: scale (0.")
    assert found["other"].endswith("if the models are the same, one of the two fits is wrong")


def test_guides():
    """Weights exp(c z^2) have the tail of a Pareto law of shape k = 2 c."""
    z = RNG.normal(size=4000)
    right = draws_of(4000, rate=0.0, scale=0.0)
    found = verdicts(
        NUTS=chains(GOOD),
        good=guide(right, 0.1 * z),
        proposal=guide(right, 0.31 * z**2),
        bad=guide(right, z**2),
        biased=guide(draws_of(4000, rate=0.5, scale=0.0), z**2),
        shifted=guide(draws_of(4000, rate=0.5, scale=0.0), 0.1 * z),
    )
    assert found["good"] == "use it"
    assert found["proposal"].startswith("use it as a proposal: k-hat 0.")
    assert found["bad"].startswith("do not trust these parameters: rate, scale; k-hat")
    assert found["bad"].endswith("although none is seen to differ from NUTS")
    assert found["biased"].startswith("do not trust these parameters: rate (0.")
    assert "scale" not in found["biased"]
    assert found["shifted"].startswith("use it as a proposal: rate (0.")


def test_a_bad_reference_is_no_reference():
    apart = {"rate": GOOD["rate"] + np.array([[0.0], [0.0], [3.0], [3.0]]), "scale": GOOD["scale"]}
    found = verdicts(
        NUTS=chains(apart), svi=guide(draws_of(rate=0.0, scale=0.0), 0.1 * RNG.normal(size=2000))
    )
    assert found["NUTS"].startswith("do not trust")
    assert found["svi"] == "use it"


def test_a_guide_without_weights():
    row = {"khat": np.nan, "efficiency": np.nan, "khat_parameters": np.nan, "draws": 9}
    known = {"rate": Evidence(np.nan, np.nan, np.nan, np.nan, 1)}
    assert variational_verdict(known, row, None).startswith("not judged")


@pytest.mark.parametrize(("number", "found"), [(1, True), (10**6, False)])
def test_many_scalars_need_more_errors(number, found):
    known = {"x": Evidence(np.nan, np.nan, 0.5, 4.5, number)}
    assert bool(differing(known)) is found


def test_verdicts_are_printed():
    table = compare_fits({"NUTS": chains(GOOD)})
    assert str(table).endswith("Verdicts\nNUTS: use it")
    assert "<b>NUTS</b>: use it" in table._repr_html_()
