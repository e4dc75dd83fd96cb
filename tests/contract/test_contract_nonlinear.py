"""Engines that are exact for any model, on one that is neither linear nor normal."""

import pytest
from engines import CASES_OF, ENGINES
from matrix import right_or_refused
from nonlinear import CASES

# No engine of normal laws is among them: those approximate here, or refuse.
EXACT = (
    "centred",
    "whitened",
    "guided",
    "Particle bootstrap",
    "Particle guided",
    "ConditionalSMC",
    "PMMH",
    "score",
    "GaussianMarkovPath",
    "ControlledPath",
)
# In the default run, where the linear matrix asks them too.
FAST = ("centred", "whitened", "Particle bootstrap")


def cells():
    for engine in EXACT:
        for case in CASES:
            fast = engine in FAST and (case.name in CASES_OF[engine] or engine == "centred")
            marks = [] if fast else [pytest.mark.slow]
            yield pytest.param(engine, case, marks=marks, id=f"{engine}-{case.name}")


@pytest.mark.parametrize(("engine", "case"), list(cells()))
def test_the_number_is_right_or_refused(engine, case):
    right_or_refused(engine, case)


@pytest.mark.parametrize("engine", ["Kalman", "smooth"])
def test_engines_of_linear_models_refuse(engine):
    with pytest.raises((TypeError, ValueError), match=r"affine|linear"):
        list(ENGINES[engine](CASES[0]))
