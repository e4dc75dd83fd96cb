"""Shared fixtures.

The default is float32, as a user's program starts: float64 is asked for test by test with the
`x64` fixture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpyro
import pytest
from jax._src.numpy import util as jax_numpy_util

import numpyro_sde as nsde

# Before any test computes; workers of a parallel run read this file too.
nsde.configure_cpu()

_PACKAGE, _JAX = (f"{Path(module.__file__).parent}/" for module in (nsde, jax))


def _refuse_rank_promotion(name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise where the package itself lets an operation add leading axes.

    NumPyro's laws and users' drifts rely on rank promotion and may: the frame that calls into JAX
    decides.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_JAX):
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        place = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        raise ValueError(f"numpyro_sde/{place}: {name} of shapes {shapes} needs rank promotion")


# A forgotten axis often broadcasts to a wrong, finite number. JAX's own switch refuses promotion
# everywhere, so the function that it calls is replaced; without it (a private name, hence the
# check) the switch would refuse NumPyro too.
if not callable(getattr(jax_numpy_util, "_rank_promotion_warning_or_error", None)):
    raise RuntimeError("JAX has renamed what tests/conftest.py replaces to check rank promotion")
jax_numpy_util._rank_promotion_warning_or_error = _refuse_rank_promotion
# Not "raise": `jnp.vectorize` has a check of its own, which NumPyro's transforms do not pass.
jax.config.update("jax_numpy_rank_promotion", "warn")


@pytest.fixture
def x64() -> Iterator[None]:
    """Run one test in float64, leaving the process in float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def x64_module() -> Iterator[None]:
    """Run a whole module in float64 (for module-scoped fitted models)."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Drop compiled functions after each file: a whole run would hold gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def validated() -> Iterator[None]:
    """Switch NumPyro's argument and value checks on for one test."""
    with numpyro.validation_enabled():
        yield


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key."""
    return jax.random.key(0)
