"""Chemical Langevin equations: reaction networks and Lotka-Volterra populations.

Each reaction fires at a rate, its propensity, and changes the state by a column of the
stoichiometry matrix; the diffusion has one Brownian motion for each reaction. Source: Gillespie
(2000), The chemical Langevin equation, equation 23; Wilkinson (2018), Stochastic Modelling for
Systems Biology, section 8.3.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.linear import small
from numpyro_sde.processes.arguments import nonnegative, parameter
from numpyro_sde.sde import SDE, as_function

_Stoichiometry = tuple[tuple[int, ...], ...]


def whole_numbers(value: Any) -> _Stoichiometry:
    """Check a stoichiometry matrix; tuples of integers are static and hashable."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError("stoichiometry must be known integers, got a traced array")
    matrix = np.asarray(value)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"stoichiometry must have shape (num_species, num_reactions), got {matrix.shape}"
        )
    if not np.all(np.isfinite(matrix)) or np.any(matrix != np.round(matrix)):
        raise ValueError("stoichiometry must hold whole numbers: the net change by a reaction")
    return tuple(tuple(int(entry) for entry in row) for row in matrix)


def _floor(floor: Any) -> float:
    if not isinstance(floor, int | float) or isinstance(floor, bool):
        raise TypeError(f"floor must be a number, got {type(floor).__name__}")
    if not (math.isfinite(floor) and floor >= 0.0):
        raise ValueError(f"floor must be finite and not negative, got {floor}")
    return float(floor)


def _rates(
    propensities: Callable[..., Any], stoichiometry: _Stoichiometry, floor: float, x: Any, p: Any
) -> Array:
    x = jnp.asarray(x, jnp.result_type(float, x))
    species, reactions = len(stoichiometry), len(stoichiometry[0])
    if x.shape != (species,):
        raise ValueError(
            f"a state must have shape ({species},), one entry for each row of stoichiometry, "
            f"got {x.shape}"
        )
    x = jnp.maximum(x, floor)
    rates = jnp.asarray(propensities(x) if p is None else propensities(x, p))
    if rates.shape != (reactions,):
        raise ValueError(
            f"propensities must return shape ({reactions},), one entry for each column of "
            f"stoichiometry, got {rates.shape}"
        )
    return rates


def root_of_rates(rates: Array) -> Array:
    """Square root of rates; zero, with derivative zero, for a reaction that cannot fire."""
    idle = rates == 0.0
    return jnp.where(idle, 0.0, jnp.sqrt(jnp.where(idle, 1.0, rates)))


def _reaction_drift(
    propensities: Any,
    stoichiometry: Any,
    floor: Any,
    t: Any,
    x: Any,
    p: Any = None,
) -> Array:
    rates = _rates(propensities, stoichiometry, floor, x, p)
    return small.matvec(jnp.asarray(stoichiometry, rates.dtype), rates)


def _reaction_diffusion(
    propensities: Any,
    stoichiometry: Any,
    floor: Any,
    t: Any,
    x: Any,
    p: Any = None,
) -> Array:
    root = root_of_rates(_rates(propensities, stoichiometry, floor, x, p))
    return jnp.asarray(stoichiometry, root.dtype) * root[None]


def mass_action(reactants: ArrayLike) -> Callable[[Array, Array], Array]:
    """Make mass-action propensities, `p[r] prod_i x_i^reactants[i, r]`.

    Args:
        reactants: molecules of each species that a reaction uses up, whole numbers of shape
            `(num_species, num_reactions)`. Rate constants are those of concentrations; for
            counts divide the constant of a dimerisation by 2.

    Returns:
        A function `(x, p)` of the state and the rate constants, shape `(num_reactions,)`.

    Raises:
        ValueError: entries that are not whole and nonnegative.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.processes import mass_action
        >>> rate = mass_action([[1, 1, 0], [0, 1, 1]])  # prey birth, predation, death
        >>> rate(jnp.array([3.0, 2.0]), jnp.array([1.0, 0.5, 0.25])).tolist()
        [3.0, 3.0, 0.5]
    """
    orders = whole_numbers(reactants)
    if min(min(row) for row in orders) < 0:
        raise ValueError("reactants must not be negative: molecules used up by a reaction")
    return Partial(_mass_action_rates, orders)


def _mass_action_rates(orders: _Stoichiometry, x: Array, p: Array) -> Array:
    rates = []
    for r in range(len(orders[0])):
        rate = p[r]
        for i, row in enumerate(orders):
            for _ in range(row[r]):
                rate = rate * x[i]
        rates.append(rate)
    return jnp.stack(rates)


class ChemicalLangevin(SDE):
    """The diffusion limit of a reaction network, `dX = S a(X) dt + S diag(sqrt a(X)) dW`.

    `S` is the stoichiometry and `a` the propensities: each reaction fires like a Poisson
    process of rate `a_r`, replaced by a Brownian motion of the same mean and variance. Good
    where every species has tens of copies and more; poor near extinction, where the jump
    process itself should be used. With more reactions than species the noise is not diagonal.

    Square roots stay real because propensities are evaluated at `max(x, floor)`: a state that
    a step carried below the floor sees the coefficients of the floor, and the gradient with
    respect to that coordinate is zero there. The state itself is not moved.

    Args:
        stoichiometry: net change of each species by each reaction, whole numbers of shape
            `(num_species, num_reactions)`; static.
        propensities: `a(x)`, or `a(x, p)` with `params`: rates of shape `(num_reactions,)`,
            1/time, nonnegative. Use a function defined once, or `mass_action(reactants)`.
        params: parameters of the propensities, handed to them as `p`.
        event_dims: their event dimensions, as for `SDE`.
        floor: least state at which the propensities are evaluated, state units.

    Raises:
        ValueError: a stoichiometry that is no matrix of whole numbers, a negative floor, or
            propensities whose shape does not fit.
        TypeError: propensities that are no function of the right arguments.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> birth_death = nsde.processes.ChemicalLangevin(
        ...     stoichiometry=[[1, -1]],
        ...     propensities=nsde.processes.mass_action([[0, 1]]),
        ...     params=jnp.array([10.0, 0.1]),
        ...     event_dims=1,
        ... )
        >>> birth_death.drift_at(0.0, jnp.array([60.0])).tolist()
        [4.0]
    """

    def __init__(
        self,
        stoichiometry: ArrayLike,
        propensities: Callable[..., Any],
        *,
        params: Any = None,
        event_dims: Any = None,
        floor: float = 1e-3,
    ) -> None:
        as_function(propensities, "propensities", "x", {"p": ("params", params is not None)})
        code = (propensities, whole_numbers(stoichiometry), _floor(floor))
        super().__init__(
            Partial(_reaction_drift, *code),
            Partial(_reaction_diffusion, *code),
            params=params,
            event_dims=event_dims,
        )

    @property
    def stoichiometry(self) -> np.ndarray:
        """Net change of each species by each reaction, `(num_species, num_reactions)`."""
        return np.array(self.drift.function.args[1])  # type: ignore[attr-defined]

    @property
    def floor(self) -> float:
        """Least state at which the propensities are evaluated."""
        return self.drift.function.args[2]  # type: ignore[attr-defined]

    def propensities_at(self, x: ArrayLike) -> Float[Array, " num_reactions"]:
        """Rates of the reactions at one state of one process, 1/time."""
        propensities, stoichiometry, floor = self.drift.function.args  # type: ignore[attr-defined]
        return _rates(propensities, stoichiometry, floor, x, self.params)


# Columns: prey birth, predation, predator death.
_LOTKA_VOLTERRA = ((1, -1, 0), (0, 1, -1))


def _hazards(prey: Array, predators: Array, p: Any) -> Array:
    return jnp.stack([p["birth"] * prey, p["predation"] * prey * predators, p["death"] * predators])


def _floored_hazards(floor: float, x: Array, p: Any) -> Array:
    x = jnp.maximum(jnp.asarray(x, jnp.result_type(float, x)), floor)
    return _hazards(x[0], x[1], p)


def _population_drift(floor: Any, t: Any, x: Any, p: Any) -> Array:
    hazards = _floored_hazards(floor, x, p)
    return small.matvec(jnp.asarray(_LOTKA_VOLTERRA, hazards.dtype), hazards)


def _population_diffusion(floor: Any, t: Any, x: Any, p: Any) -> Array:
    root = root_of_rates(_floored_hazards(floor, x, p))
    return jnp.asarray(_LOTKA_VOLTERRA, root.dtype) * root[None]


def _log_population_drift(t: Any, x: Any, p: Any) -> Array:
    prey, predators = jnp.exp(x[0]), jnp.exp(x[1])
    birth, predation, death = p["birth"], p["predation"], p["death"]
    growth = jnp.stack([birth - predation * predators, predation * prey - death])
    # Ito: minus half the squared relative noise of each population.
    noise = jnp.stack(
        [(birth + predation * predators) / prey, (predation * prey + death) / predators]
    )
    return growth - 0.5 * noise


def _log_population_diffusion(t: Any, x: Any, p: Any) -> Array:
    prey, predators = jnp.exp(x[0]), jnp.exp(x[1])
    root = root_of_rates(_hazards(prey, predators, p))
    scaled = jnp.asarray(_LOTKA_VOLTERRA, root.dtype) * root[None]
    return scaled / jnp.stack([prey, predators])[:, None]


class LotkaVolterra(SDE):
    """Stochastic predator and prey populations, in chemical Langevin form.

    Three reactions on (prey X, predators Y): birth at rate `birth X`, predation at rate
    `predation X Y`, which turns a prey into a predator, and death at rate `death Y`;
    `dX = (birth X - predation X Y) dt + sqrt(birth X) dW1 - sqrt(predation X Y) dW2`,
    `dY = (predation X Y - death Y) dt + sqrt(predation X Y) dW2 - sqrt(death Y) dW3`. The
    standard test of inference for reaction networks (Boys, Wilkinson and Kirkwood 2008;
    Golightly and Wilkinson 2011). No stationary law: one population dies out in the end.

    Args:
        birth: prey births per prey, 1/time; 0 or more.
        predation: encounters per prey and predator, 1/(time individuals); 0 or more.
        death: predator deaths per predator, 1/time; 0 or more.
        log_coordinates: take the state to be `(log X, log Y)`, by Ito's formula: real-valued,
            and populations cannot become negative in a discretised step.
        floor: least population at which the rates are evaluated (see `ChemicalLangevin`);
            not used in log coordinates.

    Raises:
        ValueError: a rate that is negative or not finite, or a negative floor.
        TypeError: an argument of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> lv = nsde.processes.LotkaVolterra(birth=1.0, predation=0.005, death=0.6)
        >>> [round(float(v), 4) for v in lv.drift_at(0.0, jnp.array([50.0, 100.0]))]
        [25.0, -35.0]
    """

    birth = parameter("birth", "Prey births per prey, 1/time.")
    predation = parameter("predation", "Encounters per prey and predator, 1/(time individuals).")
    death = parameter("death", "Predator deaths per predator, 1/time.")

    def __init__(
        self,
        birth: ArrayLike = 1.0,
        predation: ArrayLike = 0.005,
        death: ArrayLike = 0.6,
        *,
        log_coordinates: bool = False,
        floor: float = 1e-3,
    ) -> None:
        floor = _floor(floor)
        params = {
            "birth": nonnegative("birth", birth),
            "predation": nonnegative("predation", predation),
            "death": nonnegative("death", death),
        }
        if log_coordinates:
            super().__init__(_log_population_drift, _log_population_diffusion, params=params)
        else:
            super().__init__(
                Partial(_population_drift, floor),
                Partial(_population_diffusion, floor),
                params=params,
            )
