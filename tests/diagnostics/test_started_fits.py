"""Fits that compare_fits starts itself: here, in threads, in processes; failures are left out."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from numpyro_sde.diagnostics import compare_fits


def draws(shift):
    return {"a": shift + np.random.default_rng(0).normal(size=500)}


def broken():
    raise ArithmeticError("no")


FITS = {"first": partial(draws, 0.0), "second": partial(draws, 1.0), "known": draws(0.0)}


def test_functions_are_run_timed_and_compared():
    here = compare_fits(FITS)
    assert list(here.fits.index) == ["first", "second", "known"]
    assert here.fits["run_time"].notna().tolist() == [True, True, False]
    np.testing.assert_allclose(here.parameters.loc[("a", "second"), "distance"], 1.0, atol=0.05)
    with ThreadPoolExecutor(2) as pool:
        threads = compare_fits(FITS, executor=pool)
    np.testing.assert_array_equal(threads.parameters["mean"], here.parameters["mean"])


def test_a_fit_that_fails_is_left_out():
    with pytest.warns(UserWarning, match="fit 'bad' failed and is left out: ArithmeticError: no"):
        table = compare_fits({"good": partial(draws, 0.0), "bad": broken})
    assert list(table.fits.index) == ["good"]
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(ValueError, match="the reference 'bad' failed"),
    ):
        compare_fits({"bad": broken, "good": draws(0.0)})
    with pytest.raises(TypeError, match="executor must be None"):
        compare_fits(FITS, executor=1.5)


@pytest.mark.slow
def test_processes_give_the_same():
    apart = compare_fits(FITS, executor=2)
    np.testing.assert_array_equal(apart.parameters["mean"], compare_fits(FITS).parameters["mean"])
