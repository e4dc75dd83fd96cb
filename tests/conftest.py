"""Shared fixtures.

The default is float32, as a user's program starts: float64 is asked for test by test with the
`x64` fixture.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpyro
import pytest

import numpyro_sde as nsde

# Before any test computes; workers of a parallel run read this file too.
nsde.configure_cpu()


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
