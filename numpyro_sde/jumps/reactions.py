"""A reaction network: what reacts, what comes out, and how fast; the laws are `jumps.laws`.

One network is the source of a jump process on counts and of its approximations. As an SDE it is
the chemical Langevin equation; a scheme that knows counts moves it by jumps. Accumulators count
how often some reactions fired since the last time of the path: incidence of an epidemic, flux of a
reaction.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.processes.reactions import ChemicalLangevin, root_of_rates, whole_numbers
from numpyro_sde.sde import SDE, Code, as_function

_Stoichiometry = tuple[tuple[int, ...], ...]


def _mass_action(orders: _Stoichiometry, counts: bool, x: Array, p: Any) -> Array:
    """Rates of mass action; of counts, as the number of ways to choose the reactants."""
    rates = []
    constants = p["rates"]
    for r in range(len(orders[0])):
        rate = constants[..., r]
        for i, row in enumerate(orders):
            for k in range(row[r]):
                rate = rate * ((x[i] - k) / (k + 1) if counts else x[i])
        rates.append(rate)
    return jnp.stack(rates)


def _network_drift(
    propensities: Any, stoichiometry: Any, floor: Any, accumulated: Any, t: Any, x: Any, p: Any
) -> Array:
    species = x[: len(stoichiometry)]
    whole = _stack(stoichiometry, accumulated)
    rates = _rates_at(propensities, floor, species, p)
    return jnp.asarray(whole, rates.dtype) @ rates


def _network_diffusion(
    propensities: Any, stoichiometry: Any, floor: Any, accumulated: Any, t: Any, x: Any, p: Any
) -> Array:
    species = x[: len(stoichiometry)]
    rates = _rates_at(propensities, floor, species, p)
    root = root_of_rates(rates)
    return jnp.asarray(_stack(stoichiometry, accumulated), root.dtype) * root[None]


def _stack(stoichiometry: _Stoichiometry, accumulated: tuple[int, ...]) -> np.ndarray:
    matrix = np.array(stoichiometry)
    return np.concatenate([matrix, np.eye(matrix.shape[1], dtype=int)[list(accumulated)]])


def _rates_at(propensities: Any, floor: float | None, x: Array, p: Any) -> Array:
    x = jnp.asarray(x, jnp.result_type(float, x))
    x = x if floor is None else jnp.maximum(x, floor)
    return jnp.asarray(propensities(x) if p is None else propensities(x, p))


class ReactionNetwork(ChemicalLangevin):
    """A network of reactions, the source of five laws.

    Args:
        reactants: individuals of each species that a reaction takes in, whole numbers of shape
            `(num_species, num_reactions)`; static.
        products: individuals that come out of it, the same shape.
        rates: rate constants of mass action, shape `(*batch, num_reactions)`; or propensities
            `rates(x, p)` of one state, shape `(num_reactions,)`, 1/time (`rates(x)` without
            `params`). The state x holds the species.
        params: parameters of the propensities, handed to them as `p`.
        event_dims: their event dimensions, as for `SDE`.
        species: names of the species.
        reactions: names of the reactions.
        accumulate: reactions, by name or number, whose number of events since the last time of the
            path joins the state, behind the species.
        counts: whether mass action counts the ways to choose individuals, `x (x - 1) / 2` for two
            of a kind; False for concentrations, `x^2`.
        floor: least number of individuals at which the propensities of the diffusion are
            evaluated; the jump laws use none.

    Raises:
        ValueError: matrices that are not whole numbers, negative, or of different shapes; names or
            rates that do not fit them; an accumulated reaction that there is not.
        TypeError: arguments of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> sir = nsde.ReactionNetwork(
        ...     reactants=[[1, 0], [1, 1]], products=[[0, 0], [2, 0]],  # S + I -> 2 I, I -> R
        ...     rates=jnp.array([1.8 / 30, 0.6]), species=["S", "I"],
        ...     reactions=["infection", "recovery"], accumulate=["infection"],
        ... )
        >>> [round(float(a), 2) for a in sir.counted_rates(jnp.array([27.0, 3.0]))]
        [4.86, 1.8]
        >>> sir.state_names
        ('S', 'I', 'flux of infection')
    """

    reactants: _Stoichiometry = eqx.field(static=True)
    products: _Stoichiometry = eqx.field(static=True)
    species: tuple[str, ...] = eqx.field(static=True)
    reactions: tuple[str, ...] = eqx.field(static=True)
    accumulated: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        reactants: ArrayLike,
        products: ArrayLike,
        rates: Callable[..., Any] | ArrayLike,
        *,
        params: Any = None,
        event_dims: Any = None,
        species: Sequence[str] | None = None,
        reactions: Sequence[str] | None = None,
        accumulate: Sequence[str | int] = (),
        counts: bool = True,
        floor: float | None = 1e-3,
    ) -> None:
        self.reactants = _nonnegative("reactants", reactants)
        self.products = _nonnegative("products", products)
        shape = np.shape(self.reactants)
        if np.shape(self.products) != shape:
            raise ValueError(
                f"products must have the shape of reactants {shape}, got {np.shape(self.products)}"
            )
        self.species = _names("species", species, "x", shape[0])
        self.reactions = _names("reactions", reactions, "reaction ", shape[1])
        change = np.array(self.products) - np.array(self.reactants)
        net = tuple(tuple(int(v) for v in row) for row in change)
        if floor is not None and not (math.isfinite(floor) and floor >= 0.0):
            raise ValueError(f"floor must be finite and not negative, got {floor}")
        if callable(rates):
            optional = {"p": ("params", params is not None)}
            as_function(rates, "rates", "x", optional)
            propensities = rates
        else:
            if params is not None or event_dims is not None:
                raise TypeError("params and event_dims go with rates given as a function of them")
            constants = rates if isinstance(rates, jax.Array | np.ndarray) else np.array(rates)
            _check_constants(constants, shape[1])
            propensities = Partial(_mass_action, self.reactants, counts)
            params, event_dims = {"rates": constants}, {"rates": 1}
        self.accumulated = ()
        self.accumulated = tuple(self.reaction_number(name) for name in accumulate)
        drift, diffusion = _coefficients(
            (propensities, net, floor, self.accumulated), params is not None
        )
        SDE.__init__(self, drift, diffusion, params=params, event_dims=event_dims)

    @property
    def _code(self) -> tuple[Any, _Stoichiometry, float | None]:
        propensities, net, floor, _ = cast("Any", self.drift.function).args[-4:]
        return propensities, net, floor

    @property
    def num_species(self) -> int:
        """Number of species."""
        return len(self.species)

    @property
    def stoichiometry(self) -> np.ndarray:
        """Net change of each species by each reaction, `(num_species, num_reactions)`."""
        return np.array(self._code[1])

    @property
    def floor(self) -> float:
        """Least state at which the propensities of the diffusion are evaluated."""
        floor = self._code[2]
        return -math.inf if floor is None else floor

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the components of a state: the species, then the accumulators."""
        return (*self.species, *(f"flux of {self.reactions[r]}" for r in self.accumulated))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a state, accumulators included."""
        return (len(self.species) + len(self.accumulated),)

    def reaction_number(self, name: str | int) -> int:
        """The number of a reaction by its name.

        Raises:
            ValueError: no such reaction.
        """
        if isinstance(name, str) and name in self.reactions:
            return self.reactions.index(name)
        if isinstance(name, int) and 0 <= name < len(self.reactions):
            return name
        raise ValueError(
            f"there is no reaction {name!r}: the network has {', '.join(self.reactions)}"
        )

    def of(self, x: Float[Array, "*n d"], name: str) -> Float[Array, "*n"]:
        """A component of states: a species, or the flux of an accumulated reaction, by name.

        Raises:
            ValueError: no such name, or a reaction that is not accumulated.
        """
        if name in self.species:
            return x[..., self.species.index(name)]
        number = self.reaction_number(name)
        if number not in self.accumulated:
            raise ValueError(
                f"the flux of {name!r} is not part of the state: give the network "
                f"accumulate=[{name!r}]"
            )
        return x[..., self.num_species + self.accumulated.index(number)]

    def counted_rates(self, x: Float[Array, " d"]) -> Float[Array, " num_reactions"]:
        """Propensities at counts, without a floor; a reaction that lacks an individual has rate 0.

        NaN where a propensity is negative.
        """
        x = x[: self.num_species]
        rates = _rates_at(self._code[0], None, x, self.params)
        needed = jnp.asarray(self.reactants, x.dtype)
        possible = jnp.all(x[:, None] >= needed, axis=0)
        rates = jnp.where(possible, rates, 0.0)
        return jnp.where(jnp.any(rates < 0.0), jnp.nan, rates)

    def propensities_at(self, x: ArrayLike) -> Float[Array, " num_reactions"]:
        """Rates of the reactions of the diffusion at one state of one process, 1/time."""
        x = jnp.asarray(x)[: self.num_species]
        return _rates_at(self._code[0], self._code[2], x, self.params)

    def restart(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """A state with its accumulators at zero."""
        if not self.accumulated:
            return x
        return x.at[..., self.num_species :].set(0.0)

    def with_floor(self, floor: float | None) -> ReactionNetwork:
        """The same network with another floor of the diffusion's propensities; None for none."""
        propensities, net, _ = self._code
        code = (propensities, net, floor, self.accumulated)
        drift, diffusion = map(Code, _coefficients(code, self.params is not None))
        return cast(
            "ReactionNetwork",
            eqx.tree_at(
                lambda network: (network.drift, network.diffusion), self, (drift, diffusion)
            ),
        )

    @property
    def is_diffusion(self) -> bool:
        return not self.accumulated  # these start again at each time of the path

    def check_scheme(self, scheme: Any) -> None:
        """Refuse a scheme under which accumulators would never start again.

        Raises:
            ValueError: such a scheme.
        """
        if self.accumulated and not scheme.restarts:
            names = ", ".join(self.reactions[r] for r in self.accumulated)
            raise ValueError(
                f"{type(scheme).__name__} would accumulate the flux of {names} without end: use "
                "nsde.ReactionPath(net, times, init, law=...), whose laws count since the last time"
            )


def _coefficients(code: tuple[Any, ...], has_params: bool) -> tuple[Partial, Partial]:
    """Drift and diffusion, static and equal where the code is equal."""
    if has_params:
        return Partial(_network_drift, *code), Partial(_network_diffusion, *code)
    return (
        Partial(_without_params, _network_drift, *code),
        Partial(_without_params, _network_diffusion, *code),
    )


def _without_params(function: Any, *args: Any) -> Array:
    """Call a coefficient of a network that has no parameters."""
    *code, t, x = args
    return cast("Array", function(*code, t, x, None))


def _nonnegative(name: str, value: Any) -> _Stoichiometry:
    try:
        matrix = whole_numbers(value)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("stoichiometry", name)) from None
    if min(min(row) for row in matrix) < 0:
        raise ValueError(f"{name} must not be negative, got {min(min(row) for row in matrix)}")
    return matrix


def _names(role: str, given: Any, stem: str, number: int) -> tuple[str, ...]:
    if given is None:
        return tuple(f"{stem}{k}" for k in range(number))
    if isinstance(given, str):
        raise TypeError(f"{role} must be a list of names, got the string {given!r}")
    names = tuple(given)
    if len(names) != number or len(set(names)) != number:
        raise ValueError(f"{role} must be {number} different names, got {list(names)}")
    return names


def _check_constants(constants: Any, number: int) -> None:
    if constants.ndim < 1 or constants.shape[-1] != number:
        raise ValueError(
            f"rates must have shape (*batch, {number}), one constant for each reaction, got "
            f"{constants.shape}"
        )
    if isinstance(constants, jax.core.Tracer):
        return
    array = np.asarray(constants)
    if not np.all(np.isfinite(array)) or np.any(array < 0.0):
        bad = array[~np.isfinite(array) | (array < 0.0)].ravel()[0]
        raise ValueError(f"rates must be finite and not negative, got {bad}")
