"""Averaging: the SDE of the slow variable as the fast one gets infinitely fast.

With `pi(. | x)` the stationary law of the fast process at a frozen slow state x,
`drift(x) = int f(x, y) pi(dy | x)` and `diffusion(x) diffusion(x)' = int s s'(x, y) pi(dy | x)`:
the root of the averaged square, not the average of the root. Source: Pavliotis and Stuart (2008),
chapter 10; Freidlin and Wentzell (2012), chapter 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from numpyro_sde.distributions.batching import map_batch
from numpyro_sde.multiscale.effective import EffectiveSDE, direct, from_table
from numpyro_sde.multiscale.fast_law import (
    ScalarFast,
    UnnormalizedDensity,
    degree_of,
    density_nodes,
    fast_noise_shape,
    fast_shape_of,
    linear_nodes,
    scalar_nodes,
)
from numpyro_sde.multiscale.frozen import (
    ErgodicAverage,
    FixedNoise,
    ergodic_nodes,
    innovation_shape,
)
from numpyro_sde.multiscale.laws import law_nodes
from numpyro_sde.multiscale.rules import AbstractRule, MonteCarlo, as_rule, default_rule
from numpyro_sde.multiscale.slow_fast import SlowFastSDE, call, check_diffusion_shape, square_of
from numpyro_sde.multiscale.table import Table, as_table, tabulate
from numpyro_sde.sde import as_function

Nodes = Callable[[Any, Any, Any], tuple[Array, Array]]


def average(
    slow_fast: SlowFastSDE, invariant: Any = None, quadrature: Any = None, table: Any = None
) -> EffectiveSDE:
    """Average a slow-fast system over its fast variable.

    The result is an ordinary `SDE` for the slow variable, shape `()` or `(slow_dim,)`, so every
    engine takes it: direct likelihoods, NUTS, SVI, `marginalize`, guided paths, particles. Nodes
    are fixed, so that densities are deterministic, unless `quadrature` is `MonteCarlo`.

    From a path of the slow variable alone only the averages are identified, `x -> int f(x, y)
    pi(dy | x)` and that of the square, on the states visited: very different fast laws have the
    same averages. Report the averaged drift (`diagnostics.averaged_drift`), not the fast law.

    Args:
        slow_fast: the system, of `scaling="averaging"`. Its `epsilon` does not matter.
        invariant: the stationary law of the fast variable at a frozen slow state. One of

            * None: the exact law of fast dynamics that are linear in the fast variable;
            * `ScalarFast(low, high)`: the exact law of any scalar fast diffusion (of gradient
              dynamics, say);
            * a function `(x, p) -> Distribution` over one fast state (`(x)` without params);
            * a `ConditionalFlow`;
            * `UnnormalizedDensity(log_density, low, high)`;
            * `ErgodicAverage(...)`: simulation of the fast process, with common random numbers.
        quadrature: number of Gauss nodes for each fast coordinate, or a rule of
            `nsde.multiscale`: `GaussHermite`, `QuasiMonteCarlo`, `Coordinatewise`,
            `MonteCarlo`. By default 32 nodes for a scalar, 16 or 10 a coordinate for two or
            three, 1024 quasi-Monte Carlo points beyond.
        table: `(low, high, num)`, a `Table`, or an array of equally spaced slow states: average
            there, and interpolate by cubics in between; NaN outside. For long paths: a path of
            N steps costs N interpolations in place of N times the number of nodes. The
            coefficients must not depend on time.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a system of another scaling; fast dynamics that are not linear, without
            `invariant`; coefficients of the wrong shape; a table of coefficients that change
            in time.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> full = nsde.SlowFastSDE(
        ...     slow_drift=lambda t, x, y, p: -x,
        ...     slow_diffusion=lambda t, x, y, p: jnp.sqrt(0.2 + y**2),
        ...     fast_drift=lambda t, x, y, p: x - y,
        ...     fast_diffusion=lambda t, x, y, p: jnp.sqrt(2.0 * p["v"]),
        ...     epsilon=0.01,
        ...     params={"v": 0.3},
        ... )
        >>> limit = nsde.average(full, lambda x, p: dist.Normal(x, jnp.sqrt(p["v"])))
        >>> round(float(limit.diffusion_at(0.0, 1.0) ** 2), 4)  # 0.2 + x^2 + v
        1.5
    """
    if not isinstance(slow_fast, SlowFastSDE):
        raise TypeError(f"slow_fast must be an nsde.SlowFastSDE, got {type(slow_fast).__name__}")
    if slow_fast.layout.scaling != "averaging":
        raise ValueError(
            "slow_fast has scaling='homogenization', whose limit nsde.homogenize gives"
        )
    rule = as_rule(quadrature)
    nodes = nodes_of(slow_fast, invariant, rule)
    num_halves = 2 if isinstance(rule, MonteCarlo) else 1
    fast = check_shapes(slow_fast, nodes)
    functions = slow_fast.functions
    halves = Partial(_average_drift, functions["slow_drift"], nodes, num_halves)
    diffusion: Any = functions["slow_diffusion"]
    square: Any = None
    if degree_of(slow_fast, "slow_diffusion", "y", fast):
        square, diffusion = Partial(_average_square, diffusion, nodes), None
    else:
        # What does not see the fast variable needs no average, and keeps its shape.
        diffusion = Partial(_at_any_fast_state, diffusion, fast)
    grid = as_table(table, slow_fast.slow_shape)
    sampled = num_halves > 1
    if grid is None:
        return direct("averaged", slow_fast, halves, square, diffusion, sampled)
    refuse_time(slow_fast, ("slow_drift", "slow_diffusion", "fast_drift", "fast_diffusion"), fast)
    entries, dims = tabulate_all(slow_fast, grid, {"drift": halves, "square": square})
    return from_table("averaged", slow_fast, grid, entries, dims, diffusion, sampled)


def nodes_of(slow_fast: SlowFastSDE, invariant: Any, rule: AbstractRule | None) -> Nodes:
    """Nodes and weights of the fast law as a function of time, slow state and parameters."""
    functions = slow_fast.functions
    dynamics = (functions["fast_drift"], functions["fast_diffusion"])
    shape = fast_shape_of(slow_fast)
    given = slow_fast.user_params is not None
    if invariant is None:
        if degree_of(slow_fast, "fast_drift", "y", shape) > 1 or degree_of(
            slow_fast, "fast_diffusion", "y", shape
        ):
            raise ValueError(
                "invariant=None needs fast dynamics that are linear in the fast variable, with a "
                "fast_diffusion that does not depend on it: give invariant=ScalarFast(low, high) "
                "for a scalar fast variable, or its law, a ConditionalFlow, or ErgodicAverage()"
            )
        if isinstance(rule, MonteCarlo):
            raise ValueError("quadrature=MonteCarlo needs a law to draw from: give invariant")
        chosen = default_rule(size_of(shape)) if rule is None else rule
        return Partial(linear_nodes, *dynamics, shape, chosen)
    if isinstance(invariant, ScalarFast | UnnormalizedDensity | ErgodicAverage):
        if rule is not None:
            raise ValueError(
                f"quadrature is not used with invariant={type(invariant).__name__}(...), which "
                "brings its own nodes"
            )
        if isinstance(invariant, UnnormalizedDensity):
            # The function itself, so that arrays that it closes over are found.
            with_params = takes_params(invariant.log_density, given, 2)
            box = (invariant.low, invariant.high, invariant.num_points)
            return Partial(density_nodes, invariant.log_density, box, with_params)
        if isinstance(invariant, ScalarFast):
            if size_of(shape) != 1:
                raise ValueError(f"ScalarFast is for one fast coordinate, fast_dim is {shape[0]}")
            return Partial(scalar_nodes, invariant, *dynamics, shape)
        noise = innovation_shape(fast_noise_shape(slow_fast, shape), shape)
        fixed = FixedNoise(invariant.innovations(noise))
        return Partial(ergodic_nodes, invariant, shape, fixed, *dynamics)
    declared = None if slow_fast.layout.fast_dim is None else shape
    return Partial(_callable_nodes, invariant, takes_params(invariant, given, 1), rule, declared)


def takes_params(fn: Any, given: bool, num_states: int) -> bool:
    """Whether a law is a function of the params too; without params both forms serve.

    Raises:
        TypeError: a function of other arguments.
    """
    role, states = ("invariant", "x") if num_states == 1 else ("log_density", "x, y")
    if given:
        as_function(fn, role, states, {"p": ("params", True)})
        return True
    try:
        as_function(fn, role, states, {"p": ("params", False)})
    except TypeError:
        as_function(fn, role, f"{states}, p", {})
        return True
    return False


def size_of(shape: tuple[int, ...]) -> int:
    """Number of coordinates of a state of this shape."""
    return 1 if shape == () else shape[0]


def _callable_nodes(
    invariant: Any,
    with_params: bool,
    rule: Any,
    shape: tuple[int, ...] | None,
    t: Any,
    x: Any,
    p: Any,
) -> tuple[Array, Array]:
    del t
    y, weights = law_nodes(invariant(x, p) if with_params else invariant(x), rule)
    if shape is not None and y.shape[1:] != shape:
        if y.shape[1:] not in ((), (1,)) or size_of(shape) != 1:
            raise ValueError(
                f"invariant must return a law of event shape {shape}, got {y.shape[1:]}"
            )
        y = y.reshape(-1, *shape)
    return y, weights


def _average_drift(drift: Any, nodes: Nodes, num_halves: int, t: Any, x: Any, p: Any) -> Array:
    y, weights = nodes(t, x, p)
    values = jax.vmap(lambda one: call(drift, t, x, one, p))(y)
    if num_halves == 1:
        return jnp.tensordot(weights, values, axes=1)[None]
    return jnp.mean(values.reshape(num_halves, -1, *values.shape[1:]), axis=1)


def _average_square(diffusion: Any, nodes: Nodes, t: Any, x: Any, p: Any) -> Array:
    y, weights = nodes(t, x, p)
    values = jax.vmap(lambda one: call(diffusion, t, x, one, p))(y)
    return jnp.tensordot(weights, square_of(values, jnp.ndim(x)), axes=1)


def _at_any_fast_state(diffusion: Any, fast: tuple[int, ...], t: Any, x: Any, p: Any = None) -> Any:
    return call(diffusion, t, x, jnp.zeros(fast, jnp.result_type(float)), p)


def check_shapes(slow_fast: SlowFastSDE, nodes: Nodes) -> tuple[int, ...]:
    """Check the slow coefficients and the law at one state; return the shape of a fast state."""

    def evaluate(one: SlowFastSDE) -> Any:
        t, x = jnp.zeros(()), jnp.zeros(slow_fast.slow_shape)
        y, _ = nodes(t, x, one.user_params)
        functions = {k: f for k, f in one.functions.items() if k.startswith("slow")}
        return y, {k: call(f, t, x, y[0], one.user_params) for k, f in functions.items()}

    y, values = jax.eval_shape(evaluate, slow_fast.unbatched_shapes())
    shape = slow_fast.slow_shape
    for role, value in values.items():
        if role == "slow_diffusion":
            check_diffusion_shape(role, value.shape, shape)
        elif value.shape != shape:
            raise ValueError(
                f"{role} must return the shape of the slow state {shape}, got {value.shape} at a "
                f"fast state of shape {y.shape[1:]}; for several slow coordinates give slow_dim"
                f"{slow_fast.parameters.batch_hint}"
            )
    return y.shape[1:]


def refuse_time(slow_fast: SlowFastSDE, roles: tuple[str, ...], fast: tuple[int, ...]) -> None:
    """Refuse to tabulate over states what also changes in time."""
    for role in roles:
        if degree_of(slow_fast, role, "t", fast):
            raise ValueError(
                f"{role} depends on the time t, which a table over slow states cannot hold: "
                "leave table=None"
            )


def tabulate_all(
    slow_fast: SlowFastSDE, table: Table, coefficients: dict[str, Any]
) -> tuple[dict[str, Array], dict[str, int]]:
    """Tables of coefficients `fn(t, x, p)`, for every member of a batch of parameters."""
    wanted = {k: fn for k, fn in coefficients.items() if fn is not None}

    def one_process(one: SlowFastSDE) -> dict[str, Array]:
        t = jnp.zeros(())

        def at(fn: Any) -> Callable[[Array], Array]:
            return lambda x: fn(t, x, one.user_params)

        return {k: tabulate(table, at(fn)) for k, fn in wanted.items()}

    batch = slow_fast.batch_shape
    entries = map_batch(one_process, batch, (slow_fast,), (slow_fast.leaf_event_dims(),))
    return entries, {k: jnp.ndim(v) - len(batch) for k, v in entries.items()}
