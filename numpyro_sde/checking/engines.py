"""Engines in pieces, so that a budget of time can end them, and refits compiled once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import NUTS, SVI, Trace_ELBO
from numpyro.infer.mcmc import MCMCKernel

_STATISTICS = ("potential_energy", "num_steps", "accept_prob", "diverging")
_STEP_SIZE, _PARTICLES = 5e-3, 8
_PIECE, _GUIDE_PIECE = 50, 500  # iterations between two looks at the clock, at most
_SECONDS, _GROWTH = 1.0, 4  # what a piece should take, and how fast pieces grow

Engine = Callable[[Callable[..., Any]], Any]


def default_engine(model: Callable[..., Any]) -> MCMCKernel:
    """NumPyro's NUTS, with steps a little shorter than by default.

    Example:
        >>> type(default_engine(lambda: None)).__name__
        'NUTS'
    """
    return NUTS(model, target_accept_prob=0.9)


def build(engine: Engine, model: Callable[..., Any]) -> MCMCKernel | SVI:
    """A kernel or an SVI of a model: of a guide one with Adam and eight particles.

    Raises:
        TypeError: The engine made neither kernel, SVI nor guide.

    Example:
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> type(build(AutoNormal, lambda: None)).__name__
        'SVI'
    """
    made = engine(model)
    if isinstance(made, MCMCKernel | SVI):
        return made
    if callable(made):
        optimizer = numpyro.optim.ClippedAdam(_STEP_SIZE)
        return SVI(model, made, optimizer, Trace_ELBO(num_particles=_PARTICLES))
    raise TypeError(
        "engine must make of a model a NumPyro kernel, a guide or an SVI, got "
        f"{type(made).__name__}: give a class such as NUTS or AutoNormal, or a function"
    )


class Pace:
    """How many iterations to run before the next look at the clock: about a second's worth.

    One at first; NUTS may take a thousand gradients for it or a single one.

    Args:
        most: Iterations at most.

    Example:
        >>> pace = Pace(50)
        >>> pace.next(300)
        1
        >>> pace.took(1, 2.0), pace.took(1, 0.1), pace.next(300)  # the first one compiles
        (None, None, 4)
        >>> pace.took(4, 0.4), pace.next(300), pace.next(3)
        (None, 10, 3)
    """

    def __init__(self, most: int) -> None:
        self.most, self._count, self._compiled = most, 1, False

    def next(self, left: int) -> int:
        """Iterations to run, of those that are left."""
        return min(self._count, left)

    def took(self, count: int, seconds: float) -> None:
        """Learn what a piece took."""
        if self._compiled:
            fit = int(_SECONDS * count / max(seconds, 1e-9))
            self._count = max(1, min(self.most, _GROWTH * count, fit))
        self._compiled = True


class Chain:
    """One Markov chain in pieces of any length, all of them one compiled program.

    Args:
        kernel: The kernel; chains of one model share it.
        num_warmup: Warm-up iterations.
        args: Positional arguments of the model that are no part of the program's input.
        kwargs: Its keyword arguments.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model():
        ...     numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> chain = Chain(NUTS(model), num_warmup=10)
        >>> state = chain.start(jax.random.key(0))
        >>> state, draws, statistics = chain.advance(state, 7)
        >>> chain.constrain(draws)["a"].shape, sorted(statistics)[:2]
        ((7,), ['accept_prob', 'diverging'])
    """

    def __init__(
        self, kernel: MCMCKernel, num_warmup: int, args: Any = (), kwargs: Any = None
    ) -> None:
        self.kernel, self.num_warmup = kernel, num_warmup
        self.args, self.kwargs = args, kwargs or {}
        self.pace = Pace(_PIECE)
        self._begin, self._run = jax.jit(self._init), jax.jit(self._piece)
        self._postprocess = jax.jit(self._constrained)

    def start(self, rng_key: PRNGKeyArray, *data: Any) -> Any:
        """The state before the first iteration, given arguments that may differ between chains."""
        if data:
            return self._begin(rng_key, *data)
        return self.kernel.init(rng_key, self.num_warmup, None, self.args, self.kwargs)

    def advance(self, state: Any, count: int, *data: Any) -> tuple[Any, Any, Any]:
        """`count` iterations: the new state, draws as the kernel has them, and statistics."""
        begin = time.perf_counter()
        state, kept = self._run(state, jnp.int32(count), *data)
        draws, statistics = jax.tree.map(lambda rows: np.asarray(rows)[:count], kept)
        self.pace.took(count, time.perf_counter() - begin)
        return state, draws, statistics

    def constrain(self, draws: Any, *data: Any) -> dict[str, np.ndarray]:
        """Draws as sites of the model."""
        return {name: np.asarray(v) for name, v in self._postprocess(draws, *data).items()}

    def _init(self, rng_key: PRNGKeyArray, *data: Any) -> Any:
        return self.kernel.init(rng_key, self.num_warmup, None, (*self.args, *data), self.kwargs)

    def _piece(self, state: Any, count: Array, *data: Any) -> Any:
        kernel, args = self.kernel, (*self.args, *data)

        def step(state: Any) -> tuple[Any, Any]:
            state = kernel.sample(state, args, self.kwargs)
            known = {n: getattr(state, n) for n in _STATISTICS if hasattr(state, n)}
            return state, (getattr(state, kernel.sample_field), known)

        def body(index: Array, carry: Any) -> Any:
            state, rows = carry
            state, row = step(state)
            return state, jax.tree.map(lambda all, one: all.at[index].set(one), rows, row)

        one = jax.eval_shape(step, state)[1]
        rows = jax.tree.map(lambda leaf: jnp.zeros((_PIECE, *leaf.shape), leaf.dtype), one)
        return jax.lax.fori_loop(0, count, body, (state, rows))

    def _constrained(self, draws: Any, *data: Any) -> Any:
        constrain = self.kernel.postprocess_fn((*self.args, *data), self.kwargs)
        return jax.lax.map(constrain, draws, batch_size=_PIECE)


Refit = Callable[[PRNGKeyArray, Mapping[str, Any], float], "dict[str, np.ndarray] | None"]


def refitter(
    engine: Engine,
    model: Callable[..., Any],
    example: Mapping[str, Any],
    names: tuple[str, ...],
    num_warmup: int,
    num_draws: int,
) -> Refit:
    """A function of key, data and deadline that fits a model and returns draws of some sites.

    It returns None where the deadline, in seconds of `time.perf_counter`, comes first.

    Args:
        engine: As for `check`.
        model: A model of one argument, the data by site.
        example: Data to set the guide up with.
        names: Sites.
        num_warmup: Warm-up iterations, or steps of a guide.
        num_draws: Number of draws.
    """
    made = build(engine, model)
    if not isinstance(made, MCMCKernel):
        return _guide_refitter(made, example, names, num_warmup, num_draws)
    chain = Chain(made, num_warmup)

    def run(
        key: PRNGKeyArray, data: Mapping[str, Any], deadline: float
    ) -> dict[str, np.ndarray] | None:
        state, pieces, done = chain.start(key, data), [], 0
        while done < num_warmup + num_draws:
            if time.perf_counter() > deadline:
                return None
            # No piece lies on both sides of the end of warm-up.
            left = (num_warmup if done < num_warmup else num_warmup + num_draws) - done
            count = chain.pace.next(left)
            state, draws, _ = chain.advance(state, count, data)
            if done >= num_warmup:
                pieces.append(draws)
            done += count
        whole = jax.tree.map(lambda *rows: np.concatenate(rows), *pieces)
        return {name: v for name, v in chain.constrain(whole, data).items() if name in names}

    return run


def _guide_refitter(
    svi: SVI, example: Mapping[str, Any], names: tuple[str, ...], steps: int, num_draws: int
) -> Refit:
    first = svi.init(jax.random.key(0), example)
    pace = Pace(_GUIDE_PIECE)

    @jax.jit
    def train(state: Any, count: Array, data: Mapping[str, Any]) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, s: svi.stable_update(s, data)[0], state)

    @jax.jit
    def draw(key: PRNGKeyArray, state: Any, data: Mapping[str, Any]) -> dict[str, Array]:
        params = svi.get_params(state)

        def one(key: PRNGKeyArray) -> dict[str, Array]:
            with handlers.block():
                guide = handlers.substitute(handlers.seed(svi.guide, key), data=params)
                trace = handlers.trace(guide).get_trace(data)
            return {name: trace[name]["value"] for name in names}

        return jax.lax.map(one, jax.random.split(key, num_draws), batch_size=64)

    def run(
        key: PRNGKeyArray, data: Mapping[str, Any], deadline: float
    ) -> dict[str, np.ndarray] | None:
        key_train, key_draw = jax.random.split(key)
        state, done = first._replace(rng_key=key_train), 0
        while done < steps:
            if time.perf_counter() > deadline:
                return None
            count, begin = pace.next(steps - done), time.perf_counter()
            state = jax.block_until_ready(train(state, jnp.int32(count), data))
            pace.took(count, time.perf_counter() - begin)
            done += count
        return {name: np.asarray(v) for name, v in draw(key_draw, state, data).items()}

    return run
