"""Engines in pieces, so that a budget of time can end them, and refits compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpyro
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import NUTS, SVI, Trace_ELBO
from numpyro.infer.mcmc import MCMCKernel

from numpyro_sde.diagnostics.calibration.compiled import compiled_chain

_STATISTICS = ("potential_energy", "num_steps", "accept_prob", "diverging")
_STEP_SIZE, _PARTICLES = 5e-3, 8

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


class Chain:
    """One Markov chain that is run piece by piece, its pieces one compiled program.

    Args:
        kernel: The kernel; chains of one model share it.
        args: Positional arguments of the model.
        kwargs: Its keyword arguments.
        num_warmup: Warm-up iterations.
        piece: Iterations in a piece.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model():
        ...     numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> chain = Chain(NUTS(model), (), {}, num_warmup=10, piece=10)
        >>> state = chain.start(jax.random.key(0))
        >>> state, draws, statistics = chain.advance(state)
        >>> draws["a"].shape, sorted(statistics)[:2]
        ((10,), ['accept_prob', 'diverging'])
    """

    def __init__(
        self, kernel: MCMCKernel, args: Any, kwargs: Any, num_warmup: int, piece: int
    ) -> None:
        self.kernel, self.args, self.kwargs = kernel, args, kwargs
        self.num_warmup, self.piece = num_warmup, piece
        self._run = jax.jit(self._piece)

    def start(self, rng_key: PRNGKeyArray) -> Any:
        """The state before the first iteration."""
        return self.kernel.init(rng_key, self.num_warmup, None, self.args, self.kwargs)

    def advance(self, state: Any) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A piece: the new state, draws and statistics."""
        state, draws, statistics = self._run(state)
        return state, _numpy(draws), _numpy(statistics)

    def _piece(self, state: Any) -> Any:
        kernel = self.kernel

        def step(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, self.args, self.kwargs)
            known = {n: getattr(state, n) for n in _STATISTICS if hasattr(state, n)}
            return state, (getattr(state, kernel.sample_field), known)

        state, (draws, statistics) = jax.lax.scan(step, state, None, self.piece)
        constrain = kernel.postprocess_fn(self.args, self.kwargs)
        return state, jax.lax.map(constrain, draws, batch_size=self.piece), statistics


def _numpy(tree: Any) -> Any:
    return {name: np.asarray(value) for name, value in tree.items()}


def refitter(
    engine: Engine,
    model: Callable[..., Any],
    example: Mapping[str, Any],
    names: tuple[str, ...],
    num_warmup: int,
    num_draws: int,
) -> Callable[[PRNGKeyArray, Mapping[str, Any]], dict[str, Array]]:
    """A function of key and data that fits a model and returns draws of some sites.

    Args:
        engine: As for `check`.
        model: A model of one argument, the data by site.
        example: Data to set the guide up with.
        names: Sites.
        num_warmup: Warm-up iterations, or steps of a guide.
        num_draws: Number of draws.
    """
    made = build(engine, model)
    if isinstance(made, MCMCKernel):
        run = compiled_chain(made, num_warmup, num_draws)
        return lambda key, data: {name: v for name, v in run(key, data).items() if name in names}
    return _guide_refitter(made, example, names, num_warmup, num_draws)


def _guide_refitter(
    svi: SVI, example: Mapping[str, Any], names: tuple[str, ...], steps: int, num_draws: int
) -> Callable[[PRNGKeyArray, Mapping[str, Any]], dict[str, Array]]:
    first = svi.init(jax.random.key(0), example)

    def run(key: PRNGKeyArray, data: Mapping[str, Any]) -> dict[str, Array]:
        key_train, key_draw = jax.random.split(key)

        def step(state: Any, _: None) -> tuple[Any, None]:
            return svi.stable_update(state, data)[0], None

        state, _ = jax.lax.scan(step, first._replace(rng_key=key_train), None, steps)
        params = svi.get_params(state)

        def one(key: PRNGKeyArray) -> dict[str, Array]:
            with handlers.block():
                guide = handlers.substitute(handlers.seed(svi.guide, key), data=params)
                trace = handlers.trace(guide).get_trace(data)
            return {name: trace[name]["value"] for name in names}

        return jax.lax.map(one, jax.random.split(key_draw, num_draws), batch_size=64)

    return jax.jit(run)
