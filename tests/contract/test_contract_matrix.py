"""Every engine against every way to say a model: the right number, or a refusal that says why."""

import re

import jax
import numpy as np
import pytest
from cases import CASES
from engines import CASES_OF, ENGINES, NotAskedError
from known_failures import KNOWN_FAILURES

REFUSALS = (ValueError, TypeError, NotImplementedError)


def cells():
    for engine in ENGINES:
        for case in CASES:
            reason = KNOWN_FAILURES.get((engine, case.name))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            if case.name not in CASES_OF[engine]:
                marks.append(pytest.mark.slow)
            yield pytest.param(engine, case, marks=marks, id=f"{engine}-{case.name}")


@pytest.mark.parametrize(("engine", "case"), list(cells()))
def test_the_number_is_right_or_refused(engine, case):
    answers, refusal = [], None
    with jax.enable_x64(True):
        try:
            answers = list(ENGINES[engine](case))
        except NotAskedError:
            return
        except REFUSALS as error:
            refusal = str(error)
    if refusal is not None:
        assert case.refusal is not None, f"refused without need: {refusal}"
        assert re.search(case.refusal, refusal), f"refused without the reason: {refusal}"
        return
    assert not case.must_refuse, f"must be refused, gives {answers}"
    for what, got, want, tolerance in answers:
        got, want = np.asarray(got, float), np.asarray(want, float)
        assert got.shape == want.shape, f"{what}: shape {got.shape} for {want.shape}"
        near = np.abs(got - want) <= tolerance
        assert np.all(near), f"{what}: {got} for {want}, tolerance {tolerance}"


def test_the_table_of_failures_names_cells():
    names = {case.name for case in CASES}
    for engine, name in KNOWN_FAILURES:
        assert engine in ENGINES
        assert name in names
