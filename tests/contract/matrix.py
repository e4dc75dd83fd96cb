"""The rule of the matrix: an engine answers with the right number, or refuses and says why."""

import re

import jax
import numpy as np
from engines import ENGINES, NotAskedError

REFUSALS = (ValueError, TypeError, NotImplementedError)


def right_or_refused(engine, case):
    """Ask one engine for the density of one way to say a model."""
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
