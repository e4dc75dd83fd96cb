"""Every engine against every way to say a model: the right number, or a refusal that says why."""

import pytest
from cases import CASES
from engines import CASES_OF, ENGINES
from known_failures import KNOWN_FAILURES
from matrix import right_or_refused


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
    right_or_refused(engine, case)


def test_the_table_of_failures_names_cells():
    names = {case.name for case in CASES}
    for engine, name in KNOWN_FAILURES:
        assert engine in ENGINES
        assert name in names
