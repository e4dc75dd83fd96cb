"""Homogenisation: the SDE of a slow variable under a large force that averages to zero.

For `dX = (f + F/eps) dt + s dW`, `dY = (g/eps^2 + h/eps) dt + (b/eps) dV` with
`int F(x, y) pi(dy | x) = 0`, let Phi solve the cell problem `-L Phi = F`, L the generator of the
frozen fast process. The limit is the Ito equation with

    drift  = int (f + d_x Phi F + d_y Phi h) dpi,
    square = int (s s' + F Phi' + Phi F') dpi.

Source: Pavliotis and Stuart (2008), chapter 11, with the Green-Kubo form
`Phi = int_0^inf E F(x, Y_s) ds` there too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from numpyro_sde.multiscale.average import (
    check_shapes,
    nodes_of,
    refuse_time,
    size_of,
    tabulate_all,
)
from numpyro_sde.multiscale.cell_problem import MOST_MEAN, CellProblem, galerkin
from numpyro_sde.multiscale.effective import EffectiveSDE, direct, from_table
from numpyro_sde.multiscale.fast_law import degree_of, fast_noise_shape, linear_moments
from numpyro_sde.multiscale.frozen import (
    FixedNoise,
    independent,
    innovation_shape,
)
from numpyro_sde.multiscale.green_kubo import GreenKubo, green_kubo
from numpyro_sde.multiscale.rules import AbstractRule, MonteCarlo, as_rule, default_rule
from numpyro_sde.multiscale.slow_fast import SlowFastSDE, as_columns, call
from numpyro_sde.multiscale.table import as_table
from numpyro_sde.multiscale.two_scale import TwoScaleLangevin
from numpyro_sde.sde import SDE


def homogenize(
    system: SlowFastSDE | TwoScaleLangevin,
    method: CellProblem | GreenKubo | str | None = None,
    *,
    invariant: Any = None,
    quadrature: Any = None,
    table: Any = None,
) -> SDE:
    """Homogenise: the effective SDE of the slow variable as the fast one gets infinitely fast.

    The result says how it is to be read: `interpretation` is "ito", except in the Wong-Zakai
    limit, which is a Stratonovich equation.

    Args:
        system: a `TwoScaleLangevin` (scalar periodic, by quadrature; by simulation with
            `method=GreenKubo(...)`), or a `SlowFastSDE` of `scaling="homogenization"`.
        method: how a `SlowFastSDE` is treated. One of

            * "wong_zakai": coloured noise made white. For a scalar fast variable with linear
              dynamics that do not see the slow one, a forcing `F(x) y`, and a slow diffusion
              that does not depend on the state: `dX = f dt + s dW + (b / rate) F(X) o dV`, a
              **Stratonovich** SDE (Wong and Zakai 1965);
            * `CellProblem(degree)`: Ito, by polynomials;
            * `GreenKubo(...)`: Ito, by simulation;
            * None: "wong_zakai" where it applies, else `CellProblem(4)` where the fast dynamics
              are linear.
        invariant: the fast law for `CellProblem`, as for `average`; by default that of linear
            dynamics.
        quadrature: as for `average`; must be exact to twice the degree of the polynomials.
        table: as for `average`. With `GreenKubo` a path needs one: each state runs its own
            simulation.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a system of another scaling; a method that does not apply; coefficients of
            the wrong shape. A forcing whose mean is not zero gives NaN coefficients.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> coloured = nsde.SlowFastSDE(
        ...     slow_drift=lambda t, x, y: -x,
        ...     slow_diffusion=lambda t, x, y: 0.0,
        ...     fast_drift=lambda t, x, y: -y,
        ...     fast_diffusion=lambda t, x, y: jnp.sqrt(2.0),
        ...     epsilon=0.1,
        ...     scaling="homogenization",
        ...     slow_forcing=lambda t, x, y: 0.5 * x * y,
        ... )
        >>> limit = nsde.homogenize(coloured)
        >>> limit.interpretation, round(float(limit.ito_drift_at(0.0, 1.0)), 4)  # -x + x / 4
        ('stratonovich', -0.75)
    """
    if isinstance(system, TwoScaleLangevin):
        given = {"invariant": invariant, "quadrature": quadrature, "table": table}
        extra = [name for name, value in given.items() if value is not None]
        if extra or not (method is None or isinstance(method, GreenKubo)):
            name = extra[0] if extra else f"method={method!r}"
            raise ValueError(
                f"{name} is not used with a TwoScaleLangevin: leave method=None for its closed "
                "form, or give GreenKubo()"
            )
        return system.limit(None if method is None else system.sampled_slowing(method))
    if not isinstance(system, SlowFastSDE):
        raise TypeError(
            "system must be an nsde.SlowFastSDE or an nsde.multiscale.TwoScaleLangevin, got "
            f"{type(system).__name__}"
        )
    if system.layout.scaling != "homogenization":
        raise ValueError("system has scaling='averaging', whose limit nsde.average gives")
    rule = as_rule(quadrature)
    if isinstance(rule, MonteCarlo):
        raise ValueError("quadrature=MonteCarlo is for average: give fixed nodes, or GreenKubo()")
    fast = _fast_shape(system)
    if method is None:
        method = _choose(system, invariant, fast)
    if isinstance(method, str):
        if method != "wong_zakai":
            raise ValueError(
                f"method must be 'wong_zakai', CellProblem() or GreenKubo(), got {method!r}"
            )
        return _wong_zakai(system, fast)
    halves, square = _coefficients(system, method, invariant, rule, fast)
    grid = as_table(table, system.slow_shape)
    if grid is None:
        return direct("homogenised", system, halves, square, None)
    refuse_time(system, tuple(system.functions), fast)
    entries, dims = tabulate_all(system, grid, {"drift": halves, "square": square})
    return from_table("homogenised", system, grid, entries, dims, None)


def _fast_shape(system: SlowFastSDE) -> tuple[int, ...]:
    dim = system.layout.fast_dim
    return () if dim is None else (dim,)


def _choose(system: SlowFastSDE, invariant: Any, fast: tuple[int, ...]) -> Any:
    if invariant is None and not _not_wong_zakai(system, fast):
        return "wong_zakai"
    if degree_of(system, "fast_drift", "y", fast) < 2:
        return CellProblem()
    raise ValueError(
        "method=None needs fast dynamics that are linear in the fast variable: give "
        "method=CellProblem(degree) with the fast law as invariant, or method=GreenKubo()"
    )


def _not_wong_zakai(system: SlowFastSDE, fast: tuple[int, ...]) -> str:
    """Why the Wong-Zakai limit does not apply; empty where it does."""

    def degree(role: str, argument: str) -> int:
        return degree_of(system, role, argument, fast)

    if size_of(fast) != 1:
        return "there are several fast coordinates"
    if "fast_forcing" in system.functions:
        return "there is a fast_forcing"
    if degree("fast_drift", "y") > 1 or degree("fast_diffusion", "y"):
        return "the fast dynamics are not linear with additive noise"
    if degree("fast_drift", "x") or degree("fast_diffusion", "x"):
        return "the fast dynamics depend on the slow variable"
    if degree("slow_forcing", "y") > 1:
        return "slow_forcing is not linear in the fast variable"
    if degree("slow_diffusion", "x") or degree("slow_diffusion", "y"):
        return "slow_diffusion depends on the state, which asks for an Ito term of its own"
    if degree("slow_drift", "y"):
        return "slow_drift depends on the fast variable"
    return ""


def _wong_zakai(system: SlowFastSDE, fast: tuple[int, ...]) -> EffectiveSDE:
    why = _not_wong_zakai(system, fast)
    if why:
        raise ValueError(f"method='wong_zakai' does not apply: {why}; use CellProblem()")
    functions = system.functions
    return EffectiveSDE(
        "homogenised (Wong-Zakai: Stratonovich)",
        Partial(_plain_drift, functions["slow_drift"], fast),
        diffusion=Partial(
            _coloured_diffusion,
            *(functions[k] for k in ("slow_diffusion", "slow_forcing")),
            *(functions[k] for k in ("fast_drift", "fast_diffusion")),
            fast,
        ),
        params=system.user_params,
        event_dims=system.event_dims,
        interpretation="stratonovich",
    )


def _plain_drift(drift: Any, fast: tuple[int, ...], t: Any, x: Any, p: Any) -> Array:
    return call(drift, t, x, jnp.zeros(fast, jnp.result_type(float)), p)[None]


def _coloured_diffusion(
    slow: Any,
    forcing: Any,
    drift: Any,
    diffusion: Any,
    fast: tuple[int, ...],
    t: Any,
    x: Any,
    p: Any = None,
) -> Array:
    """Columns: the slow noises, then the coloured one made white."""
    zero = jnp.zeros(fast, jnp.result_type(float))
    x = jnp.asarray(x)
    A, mean, _ = linear_moments(drift, diffusion, fast, t, x, p)
    at_zero, slope = jax.jvp(lambda y: call(forcing, t, x, y, p), (zero,), (jnp.ones_like(zero),))
    # A mean force at the fast mean would be of size 1/epsilon: no limit.
    force = at_zero + slope * mean[0]
    slope = jnp.where(jnp.abs(force) <= MOST_MEAN * jnp.abs(slope), slope, jnp.nan)
    size = jnp.sqrt(jnp.sum(call(diffusion, t, x, zero, p) ** 2)) / -A[0, 0]
    own = as_columns(call(slow, t, x, zero, p), x)
    both = jnp.concatenate([own, jnp.reshape(size * slope, (-1, 1))], axis=1)
    return both[0] if x.ndim == 0 else both


def _coefficients(
    system: SlowFastSDE, method: Any, invariant: Any, rule: Any, fast: tuple[int, ...]
) -> tuple[Any, Any]:
    functions = system.functions
    if isinstance(method, CellProblem):
        if invariant is None and rule is None:
            rule = _rule_for(method.degree, size_of(fast))
        nodes = nodes_of(system, invariant, rule)
        check_shapes(system, nodes)
        solve = Partial(galerkin, functions, nodes, method.degree)
    elif isinstance(method, GreenKubo):
        if invariant is not None or rule is not None:
            raise ValueError("invariant and quadrature are not used with method=GreenKubo(...)")
        _require_noise(system, fast)
        noise = fast_noise_shape(system, fast)
        first, lags = method.num_steps
        z = independent(
            method.seed, first + 2 * lags, method.num_chains, innovation_shape(noise, fast)
        )
        solve = Partial(green_kubo, functions, method, fast, FixedNoise(z))
    else:
        raise TypeError(
            f"method must be 'wong_zakai', CellProblem() or GreenKubo(), got {method!r}"
        )
    return Partial(_part, 0, solve), Partial(_part, 1, solve)


def _require_noise(system: SlowFastSDE, fast: tuple[int, ...]) -> None:
    """Refuse fast dynamics without noise: chains from one start would all be the same one."""
    if any(degree_of(system, "fast_diffusion", argument, fast) for argument in "txy"):
        return
    with jax.ensure_compile_time_eval():
        t, x, y = (jnp.zeros(shape) for shape in ((), system.slow_shape, fast))
        size = call(system.functions["fast_diffusion"], t, x, y, system.user_params)
        if isinstance(size, jax.core.Tracer) or bool(jnp.any(size != 0)):
            return
    raise ValueError(
        "GreenKubo() averages over chains that all begin at `start`, and with fast_diffusion zero "
        "they stay one and the same: no correlation can be read off them (NaN). Give the fast "
        "variable noise, or state its law: CellProblem() with invariant="
    )


def _rule_for(degree: int, dim: int) -> AbstractRule:
    fixed = default_rule(dim)
    order = getattr(fixed, "order", None)
    if order is not None and order <= degree:
        raise ValueError(f"degree {degree} needs quadrature={degree + 1} nodes a coordinate")
    return fixed


def _part(index: int, solve: Any, t: Any, x: Any, p: Any) -> Array:
    drift, square = solve(t, x, p)
    return drift[None] if index == 0 else square
