"""Where the seconds go: nested reports are joined, phases are disjoint."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnostic_models import CONJUGATE_DATA, conjugate
from numpyro.infer import MCMC, NUTS

from numpyro_sde.diagnostics import Timing, timed
from numpyro_sde.runtime import clock
from numpyro_sde.runtime.clock import covered, searching


def test_sleep_is_run_time_and_compilation_is_not():
    @jax.jit
    def outer(x):
        inner = jax.jit(lambda y: jnp.sin(y) @ jnp.cos(y))
        for _ in range(30):
            x = inner(x) / 10.0
        return x

    def work(x):
        time.sleep(0.2)
        return outer(x)

    x = jnp.eye(3)
    result, cold = timed(work, x)
    np.testing.assert_allclose(result, work(x))
    _, warm = timed(work, x)
    # Traces of `inner` nest in that of `outer`: added up, they would exceed the wall time.
    assert 0.0 < cold.compile_time < cold.wall_time - 0.2
    assert cold.run_time >= 0.2
    assert warm.compile_time < 0.05 * cold.compile_time
    assert warm.run_time >= 0.2


def test_phases_are_disjoint():
    @jax.jit
    def outer(x):
        jnp.ones(11) + 2.0  # compiled inside the trace: counts as compiling
        return jnp.sin(x) @ jnp.cos(x)

    def work():
        with searching():
            time.sleep(0.1)
            jax.block_until_ready(outer(jnp.eye(7)))
        time.sleep(0.1)

    _, timing = timed(work)
    parts = (timing.compile_time, timing.trace_time, timing.search_time, timing.run_time)
    assert all(part > 0.0 for part in parts)
    assert sum(parts) == pytest.approx(timing.wall_time)
    assert 0.1 <= timing.search_time < 0.1 + 0.5 * timing.compile_time
    assert timing.import_time > 0.0


def test_overlapping_reports_count_once():
    assert covered([(1.0, 4.0), (2.0, 3.0), (3.5, 5.0), (7.0, 8.0)], 0.0) == pytest.approx(5.0)
    assert covered([(1.0, 4.0)], 3.0) == pytest.approx(1.0)
    assert covered([], 0.0) == 0.0


def test_mcmc_is_waited_for_and_errors_stop_the_listening():
    mcmc = MCMC(NUTS(conjugate), num_warmup=5, num_samples=5, progress_bar=False)
    result, timing = timed(mcmc.run, jax.random.key(0), y=CONJUGATE_DATA)
    assert result is None
    assert (
        timing.compile_time + timing.trace_time > 0.5 * timing.wall_time
    )  # ten draws of one parameter
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)
    assert clock._running == []


def test_run_time_is_the_rest():
    assert Timing(wall_time=5.0, compile_time=1.5).run_time == 3.5
    assert Timing(9.0, 1.0, trace_time=2.0, search_time=3.0, import_time=7.0).run_time == 3.0
