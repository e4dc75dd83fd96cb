"""The one place that imports BlackJAX: its kernels with adaptation one draw at a time.

BlackJAX adapts in one call before sampling. Under `numpyro.infer.MCMC` a kernel is called draw by
draw, warm-up included, so here adaptation is a state with an update: Stan's windows, made of
BlackJAX's own dual averaging and mass matrices, for kernels that accept and reject; for
unadjusted MCLMC the rule of Robnik, De Luca, Silverstein and Seljak (2023, "Microcanonical
Hamiltonian Monte Carlo", section 4), which holds the energy error for each dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

try:
    import blackjax
    from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
    from blackjax.adaptation.step_size import dual_averaging_adaptation
    from blackjax.adaptation.window_adaptation import build_schedule
    from blackjax.mcmc import hmc
    from blackjax.smc import adaptive_tempered, resampling
except ImportError as error:
    raise ImportError(
        "infer.BlackJAX and infer.ibis need BlackJAX: pip install 'numpyro-sde[blackjax]'"
    ) from error

LogDensity = Callable[[Array], Array]

# Energy error of MCLMC: variance for each dimension, spread of the weights, memory in steps.
_ENERGY_VARIANCE, _TRUST, _MEMORY = 5e-4, 1.5, 150
_GROWTH = 0.8  # the largest step is this share of one that failed


class Tuning(NamedTuple):
    """What adaptation sets.

    Attributes:
        step_size: length of one step of the integrator.
        inverse_mass: variances `(D,)`, or covariances `(D, D)`.
        decoherence: length after which MCLMC has forgotten its direction.
    """

    step_size: Float[Array, ""]
    inverse_mass: Float[Array, "..."]
    decoherence: Float[Array, ""]


class Report(NamedTuple):
    """What a transition says of itself.

    Attributes:
        accept_prob: acceptance probability, 1 for kernels that do not reject.
        diverging: whether it was given up or the energy error is very large.
        num_steps: steps of the integrator.
        energy_change: energy error, 0 where the kernel gives none.
    """

    accept_prob: Array
    diverging: Array
    num_steps: Array
    energy_change: Array


class Algorithm(NamedTuple):
    """A BlackJAX algorithm on vectors.

    Attributes:
        init: `init(position, log_density, key)` returns its state.
        step: `step(key, state, log_density, tuning)` returns its state and a `Report`.
        adaptation: "acceptance", "energy", or None where the user has set everything.
        target: acceptance rate to aim at.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Report]]
    adaptation: str | None
    target: float


def _report(info: Any, dtype: Any) -> Report:
    """A report from BlackJAX's own, whatever it holds."""
    accept = getattr(info, "acceptance_rate", None)
    if accept is None:
        accept = getattr(info, "is_accepted", 1.0)
    steps = getattr(info, "num_integration_steps", 1)
    diverging = getattr(info, "is_divergent", False)
    accept = jnp.asarray(accept, dtype)
    return Report(
        jnp.where(jnp.isnan(accept), 0.0, accept),
        jnp.asarray(diverging, bool),
        jnp.asarray(steps, int),
        jnp.zeros((), dtype),
    )


def _hmc(module: Any, **options: int) -> Algorithm:
    """An algorithm of the HMC family."""
    kernel = module.build_kernel()

    def init(position: Array, log_density: LogDensity, key: PRNGKeyArray) -> Any:
        del key
        return module.init(position, log_density)

    def step(
        key: PRNGKeyArray, state: Any, log_density: LogDensity, tuning: Tuning
    ) -> tuple[Any, Report]:
        state, info = kernel(
            key,
            state,
            log_density,
            step_size=tuning.step_size,
            inverse_mass_matrix=tuning.inverse_mass,
            **options,
        )
        return state, _report(info, state.logdensity.dtype)

    return Algorithm(init, step, "acceptance", 0.8)


def _adjusted_mclmc(num_steps: int) -> Algorithm:
    module = blackjax.adjusted_mclmc_dynamic

    def number(key: PRNGKeyArray) -> Array:
        return jax.random.randint(key, (), 1, 2 * num_steps)  # of this mean

    kernel = module.build_kernel(integration_steps_fn=number)

    def init(position: Array, log_density: LogDensity, key: PRNGKeyArray) -> Any:
        _at_least_two(position)
        return module.init(position, log_density, key)

    def step(
        key: PRNGKeyArray, state: Any, log_density: LogDensity, tuning: Tuning
    ) -> tuple[Any, Report]:
        state, info = kernel(
            key,
            state,
            log_density,
            step_size=tuning.step_size,
            inverse_mass_matrix=tuning.inverse_mass,
        )
        return state, _report(info, state.logdensity.dtype)

    return Algorithm(init, step, "acceptance", 0.9)


def _mclmc() -> Algorithm:
    kernel = blackjax.mclmc.build_kernel()

    def init(position: Array, log_density: LogDensity, key: PRNGKeyArray) -> Any:
        _at_least_two(position)
        return blackjax.mclmc.init(position, log_density, key)

    def step(
        key: PRNGKeyArray, state: Any, log_density: LogDensity, tuning: Tuning
    ) -> tuple[Any, Report]:
        state, info = kernel(
            key,
            state,
            log_density,
            inverse_mass_matrix=tuning.inverse_mass,
            L=tuning.decoherence,
            step_size=tuning.step_size,
        )
        one = jnp.ones((), state.logdensity.dtype)
        return state, Report(one, ~info.nonans, jnp.ones((), int), info.energy_change)

    return Algorithm(init, step, "energy", 1.0)


def _at_least_two(position: Array) -> None:
    if position.size < 2:
        raise ValueError(
            "microcanonical algorithms need a model of at least 2 unknowns: use 'nuts'"
        )


def _built(builder: Callable[[LogDensity], Any]) -> Algorithm:
    """An algorithm that the user has built with all that it needs."""

    def init(position: Array, log_density: LogDensity, key: PRNGKeyArray) -> Any:
        return builder(log_density).init(position, key)

    def step(
        key: PRNGKeyArray, state: Any, log_density: LogDensity, tuning: Tuning
    ) -> tuple[Any, Report]:
        state, info = builder(log_density).step(key, state)
        return state, _report(info, tuning.step_size.dtype)

    return Algorithm(init, step, None, 0.0)


# Of the HMC family: the name of what the user sets.
_ACCEPTING = {
    "nuts": "max_num_doublings",
    "hmc": "num_integration_steps",
    "multinomial_hmc": "num_integration_steps",
}
NAMES = (*_ACCEPTING, "mclmc", "adjusted_mclmc")


def name_of(algorithm: Any) -> str | None:
    """The name of an algorithm given by name or as BlackJAX's own object, else None."""
    if isinstance(algorithm, str):
        return algorithm
    known = {name: getattr(blackjax, name) for name in NAMES}
    known["adjusted_mclmc_dynamic"] = blackjax.adjusted_mclmc_dynamic
    for name, value in known.items():
        if algorithm is value:
            return name.removesuffix("_dynamic")
    return None


def make_algorithm(
    algorithm: Any, num_steps: int | None = None, max_tree_depth: int = 10
) -> Algorithm:
    """The algorithm of a name, of BlackJAX's own object, or of a builder.

    Raises:
        ValueError: an unknown name.
        TypeError: neither of the three.
    """
    name = name_of(algorithm)
    if name is None:
        if not callable(algorithm) or isinstance(algorithm, blackjax.GenerateSamplingAPI):
            raise TypeError(
                f"algorithm must be one of {NAMES}, or a function from a log density to a "
                f"BlackJAX sampling algorithm, got {type(algorithm).__name__}"
            )
        return _built(algorithm)
    if name not in NAMES:
        raise ValueError(f"algorithm must be one of {NAMES}, or a function, got {name!r}")
    if name == "mclmc":
        return _mclmc()
    if name == "adjusted_mclmc":
        return _adjusted_mclmc(num_steps or 2)
    value = max_tree_depth if name == "nuts" else num_steps or 10
    return _hmc(getattr(blackjax, name), **{_ACCEPTING[name]: value})


class Adaptation(NamedTuple):
    """How a kernel is tuned: `init(dim, dtype)` and `update(state, i, position, report)`.

    `tuning(state)` reads the present values.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


class AdaptationState(NamedTuple):
    """Present values, and what they come from."""

    tuning: Tuning
    memory: Any


def make_adaptation(
    algorithm: Algorithm,
    num_warmup: int,
    step_size: float | None,
    dense: bool,
    target: float | None,
) -> Adaptation:
    """Adaptation over the first `num_warmup` draws.

    Args:
        algorithm: what is tuned.
        num_warmup: draws of warm-up.
        step_size: where it begins; None for a default.
        dense: adapt covariances, not only variances.
        target: acceptance rate to aim at; None for the algorithm's own.
    """
    if step_size is None and algorithm.adaptation != "energy":
        step_size = 1.0
    first = partial(_first_tuning, step_size=step_size, dense=dense)
    if algorithm.adaptation is None or num_warmup == 0:

        def still(state: AdaptationState, i: Any, position: Any, report: Any) -> AdaptationState:
            del i, position, report
            return state

        return Adaptation(lambda dim, dtype: AdaptationState(first(dim, dtype), ()), still)
    if algorithm.adaptation == "energy":
        return _by_energy(num_warmup, first)
    return _by_acceptance(num_warmup, first, dense, algorithm.target if target is None else target)


def _first_tuning(dim: int, dtype: Any, *, step_size: float | None, dense: bool) -> Tuning:
    root = float(np.sqrt(dim))
    return Tuning(
        jnp.asarray(0.25 * root if step_size is None else step_size, dtype),
        jnp.eye(dim, dtype=dtype) if dense else jnp.ones(dim, dtype),
        jnp.asarray(root, dtype),
    )


def _by_acceptance(num_warmup: int, first: Any, dense: bool, target: float) -> Adaptation:
    begin, average, settle = dual_averaging_adaptation(target)
    mass_begin, mass_gather, mass_settle = mass_matrix_adaptation(not dense)
    schedule = jnp.asarray(build_schedule(num_warmup), int)

    def init(dim: int, dtype: Any) -> AdaptationState:
        tuning = first(dim, dtype)
        memory = jax.tree.map(
            lambda a: jnp.asarray(a, dtype if jnp.issubdtype(jnp.result_type(a), float) else None),
            (begin(tuning.step_size), mass_begin(dim)),
        )
        return AdaptationState(tuning, memory)

    def adapt(state: AdaptationState, i: Array, position: Array, report: Report) -> AdaptationState:
        stage, ends = schedule[i]
        step, mass = state.memory
        step = average(step, report.accept_prob)
        mass = jax.lax.cond(stage == 1, lambda m: mass_gather(m, position), lambda m: m, mass)

        def close() -> Any:
            return begin(settle(step)), mass_settle(mass)

        like = partial(jax.tree.map, lambda new, old: jnp.asarray(new, old.dtype))
        step, mass = jax.lax.cond(
            ends == 1, lambda: like(close(), state.memory), lambda: like((step, mass), state.memory)
        )
        last = i == num_warmup - 1
        size = jnp.where(last, settle(step), jnp.exp(step.log_step_size))
        tuning = state.tuning._replace(
            step_size=size.astype(state.tuning.step_size.dtype),
            inverse_mass=mass.inverse_mass_matrix,
        )
        return AdaptationState(tuning, (step, mass))

    def update(
        state: AdaptationState, i: Array, position: Array, report: Report
    ) -> AdaptationState:
        return jax.lax.cond(
            i < num_warmup, lambda: adapt(state, i, position, report), lambda: state
        )

    return Adaptation(init, update)


class _Energy(NamedTuple):
    """Running means behind the step of MCLMC, and moments of positions."""

    weight: Array
    mean: Array  # of the energy error's square over step^6, in units of the wanted one
    largest: Array
    total: Array
    first: Array
    second: Array


def _by_energy(num_warmup: int, first: Any) -> Adaptation:
    # A step for unit variances; the variances; a step for these.
    gather, close = int(0.4 * num_warmup), int(0.8 * num_warmup)
    decay = (_MEMORY - 1.0) / (_MEMORY + 1.0)

    def fresh(dim: int, dtype: Any) -> _Energy:
        zero = jnp.zeros((), dtype)
        return _Energy(
            zero, zero, zero + jnp.inf, zero, jnp.zeros(dim, dtype), jnp.zeros(dim, dtype)
        )

    def init(dim: int, dtype: Any) -> AdaptationState:
        return AdaptationState(first(dim, dtype), fresh(dim, dtype))

    def adapt(state: AdaptationState, i: Array, position: Array, report: Report) -> AdaptationState:
        tuning, memory = state
        size, dim = tuning.step_size, position.size
        failed = report.diverging | ~jnp.isfinite(report.energy_change)
        error = jnp.where(failed, 0.0, report.energy_change)
        # The variance of the energy error grows as the sixth power of the step.
        ratio = error**2 / (dim * _ENERGY_VARIANCE) + 1e-8
        trust = jnp.exp(-0.5 * (jnp.log(ratio) / (6.0 * _TRUST)) ** 2)
        mean = decay * memory.mean + trust * ratio / size**6
        weight = decay * memory.weight + trust
        largest = jnp.where(failed, jnp.minimum(memory.largest, _GROWTH * size), memory.largest)
        size = jnp.minimum((mean / weight) ** (-1.0 / 6.0), largest)
        share = jnp.where((i >= gather) & ~failed, size, 0.0)
        memory = _Energy(
            weight,
            mean,
            largest,
            memory.total + share,
            memory.first + share * position,
            memory.second + share * position**2,
        )
        tuning = tuning._replace(step_size=size)

        def renew() -> AdaptationState:
            centre = memory.first / memory.total
            variance = memory.second / memory.total - centre**2
            usable = jnp.all(jnp.isfinite(variance) & (variance > 0))
            new = jnp.where(usable, variance, tuning.inverse_mass)
            return AdaptationState(tuning._replace(inverse_mass=new), fresh(dim, position.dtype))

        return jax.lax.cond(i == close - 1, renew, lambda: AdaptationState(tuning, memory))

    def update(
        state: AdaptationState, i: Array, position: Array, report: Report
    ) -> AdaptationState:
        return jax.lax.cond(
            i < num_warmup, lambda: adapt(state, i, position, report), lambda: state
        )

    return Adaptation(init, update)


def tempered_stages(
    log_start: LogDensity, log_ratio: LogDensity, num_leapfrog: int, least_share: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Adaptive tempered SMC from one density to its product with a ratio, by Hamiltonian moves.

    Returns:
        What makes a state of draws `(N, D)`, and a stage `(key, state, num_moves, parameters)` that
        moves, resamples and weighs; its parameters `step_size` and `inverse_mass_matrix` have a
        leading dimension of 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.interop.blackjax import tempered_stages
        >>> begin, stage = tempered_stages(lambda z: -jnp.sum(z**2), lambda z: -jnp.sum(z), 8, 0.5)
        >>> float(begin(jnp.zeros((10, 2))).tempering_param)
        0.0
    """
    kernel = adaptive_tempered.build_kernel(
        log_start,
        log_ratio,
        partial(hmc.build_kernel(), num_integration_steps=num_leapfrog),
        hmc.init,
        resampling.systematic,
        least_share,
    )
    return adaptive_tempered.init, jax.jit(kernel, static_argnums=2)
