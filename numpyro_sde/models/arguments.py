"""A model's arguments as those of a compiled program.

What the model observes is data: arrays that a program takes as arguments, so that new data of the
same shape find it. Everything else (times, sizes, flags) decides what the program is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import block, seed, trace
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_sde.runtime.entry import Held, holds_same_numbers

R = TypeVar("R")


def with_data_as_arguments(
    model: Callable[..., Any], args: Any, kwargs: Any, run: Callable[[Any], R]
) -> R:
    """Call `run(arguments)` of an entry point, which gets `(args, kwargs)` back by `released`.

    A model that asks for the numbers of its data is compiled for these data.
    """
    try:
        return run(_held(args, kwargs, _observed_values(model, args, kwargs)))
    except jax.errors.JAXTypeError:
        return run(_held(args, kwargs, []))


def released(arguments: Any) -> Any:
    """`(args, kwargs)` inside the program."""
    return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Held) else leaf, arguments)


def _observed_values(model: Callable[..., Any], args: Any, kwargs: Any) -> list[np.ndarray]:
    """Arrays that a run of the model observes as they are."""
    found: list[np.ndarray] = []

    def run() -> int:
        with block(), trace() as recorded, seed(rng_seed=0):
            model(*args, **kwargs)
        for site in recorded.values():
            value = site.get("value")
            known = not isinstance(value, jax.core.Tracer)
            if site["type"] == "sample" and site["is_observed"] and known:
                found.append(np.asarray(value))
        return 0

    jax.eval_shape(run)
    return found


def _held(args: Any, kwargs: Any, observed: list[np.ndarray]) -> Any:
    """Arguments of a model: those that are observed as arrays, the others as they are."""

    def hold(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        array = isinstance(leaf, jax.Array | np.ndarray)
        is_data = array and any(holds_same_numbers(leaf, y) for y in observed)
        return jnp.asarray(leaf) if is_data else Held(leaf)

    # Values of the sites that other blocks of a Gibbs sampler move are no part of a program either.
    moved = {name: value for name, value in kwargs.items() if name == GIBBS_SITES_KWARG}
    rest = {name: value for name, value in kwargs.items() if name not in moved}
    args, rest = jax.tree.map(hold, (args, rest))
    return args, {**rest, **jax.tree.map(jnp.asarray, moved)}
