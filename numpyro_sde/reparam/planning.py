"""Where a guided path is linearised, and where its sampler starts: the mode along the guide.

One program is compiled for a model: the density along given references and its gradient in all
unconstrained values, with the data as arguments, which gives the guided paths too. The search for
the mode, the curvature there and the first state of a sampler are calls of it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import biject_to
from numpyro.handlers import reparam, seed, substitute
from numpyro.infer.initialization import init_to_median
from numpyro.infer.reparam import Reparam
from numpyro.infer.util import log_density

from numpyro_sde.models.stack import Run, enclosing_run
from numpyro_sde.reparam.path import is_innovation, unwrap
from numpyro_sde.runtime.clock import searching
from numpyro_sde.runtime.entry import holds_same_numbers

# Rounds of search, each along new reference paths, and steps in one.
_ROUNDS, _STEPS = 8, 20
# Moves of the reference at one set of parameters, halvings of a step that its own reference path
# shows to be too long, and nats that are none to go on for.
_MOVES, _HALVINGS, _SETTLED = 2, 4, 0.05
# Step of the difference of gradients behind the curvature: unconstrained, so of unit scale.
_DIFFERENCE = 1e-2
# More free values than this: their curvature, two gradients for each, is not asked for.
_MOST_FREE = 400


class Plan(NamedTuple):
    """Where to linearise, and the guide at the plug-in parameters; NumPy arrays."""

    reference: np.ndarray  # (*lead, N, d)
    H: np.ndarray  # (*lead, N, d, d)
    e: np.ndarray  # (*lead, N, d)


_collecting: list[list[Any]] = []


class Found(NamedTuple):
    """What a search found.

    Attributes:
        plans: for each guided path, where to linearise.
        mode: unconstrained values of all latent sites at the mode, innovations zero; NumPy arrays.
        names: the sites that are free, in order: searched over, or where the user put them.
        covariance: inverse curvature of minus the log density there, `(D, D)`, the sites in the
            order of `names`; None where there are too many or the curvature is not finite.
        gradient: `gradient(z)` gives minus the log density along the plans, and its gradient.
    """

    plans: dict[str, Plan]
    mode: dict[str, np.ndarray]
    names: tuple[str, ...]
    covariance: Float[np.ndarray, "D D"] | None
    gradient: Callable[[Any], tuple[Any, Any]]


class Program(NamedTuple):
    """The compiled density of a model along references, for data of one shape.

    Attributes:
        key: what it was compiled for.
        start: `start(data, careful)`: where a search begins, values of all sites and first
            references; unless `careful`, what is quick to compile is tried first.
        gradient: `gradient(z, references, data)`: minus the log density with paths and guides,
            and its gradient.
        fixed: sites that the search leaves alone.
        given: paths along states that the user gave.
        users: the reparametrisations that share it.
    """

    key: Any
    start: Callable[[list[Any], bool], tuple[dict[str, Any], dict[str, Any]]]
    gradient: Callable[..., Any]
    fixed: frozenset[str]
    given: frozenset[str]
    users: tuple[Any, ...]


class Guiding(NamedTuple):
    """How guided paths are drawn; what `GuidedReparam` lends to the search.

    Attributes:
        is_owner: whether a reparametrisation is a guided one.
        along: `along(owner, name, site, run, reference)` draws a path along a reference; gives it,
            the guide and the states.
        first: `first(owner, name, site, run, careful)` gives a first path, its reference, and
            whether all components of the reference have been seen. Unless `careful`, what is
            quick to compile is enough.
    """

    is_owner: Callable[[Any], bool]
    along: Callable[..., tuple[Array, Any]]
    first: Callable[..., tuple[Array, Any, Any]]


class _Along(Reparam):
    """A guided path handed to `draw(owner, name, site, run)`, which gives its value."""

    def __init__(self, owner: Any, draw: Callable[..., Array]) -> None:
        self.owner, self.draw = owner, draw

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Array]:  # noqa: ARG002
        site = unwrap(name, fn, self.owner)
        run = enclosing_run(sys._getframe(1), name, type(self.owner).__name__)
        return None, self.draw(self.owner, name, site, run)


class Arguments:
    """The arguments of a run, those that are data apart.

    Args:
        run: the run.
        data: arrays that are observed in it. An argument that holds the same numbers is data.
    """

    def __init__(self, run: Run, data: list[Any]) -> None:
        tree = (run.args, run.kwargs, [outer.data for outer in run.conditions])
        self.leaves, self.treedef = jax.tree_util.tree_flatten(tree)
        observed = [np.asarray(y) for y in data]
        self.is_data = tuple(
            isinstance(leaf, jax.Array | np.ndarray)
            and any(holds_same_numbers(leaf, y) for y in observed)
            for leaf in self.leaves
        )

    @property
    def data(self) -> list[Any]:
        """The arrays that are data, on the host: an outer trace would trace them."""
        pairs = zip(self.leaves, self.is_data, strict=True)
        arrays = [np.asarray(leaf) for leaf, data in pairs if data]
        return [a.astype(jax.dtypes.canonicalize_dtype(a.dtype)) for a in arrays]

    def all_static(self) -> Arguments:
        """The same with no argument taken for data."""
        new = object.__new__(Arguments)
        new.leaves, new.treedef = self.leaves, self.treedef
        new.is_data = (False,) * len(self.leaves)
        return new

    def key(self) -> tuple[Any, bytes, bool]:
        """Changes with the arguments, of data with shape and type alone."""
        total = hashlib.sha256()
        for leaf, is_data in zip(self.leaves, self.is_data, strict=True):
            if isinstance(leaf, jax.Array | np.ndarray | float | int):
                array = np.asarray(leaf)
                total.update(repr((array.shape, array.dtype, is_data)).encode())
                total.update(b"" if is_data else array.tobytes())
            else:
                total.update(repr(leaf).encode())
        return self.treedef, total.digest(), bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]

    def run_with(self, run: Run, data: list[Any]) -> Run:
        """The run with other data."""
        rest = iter(data)
        leaves = [
            next(rest) if is_data else leaf
            for leaf, is_data in zip(self.leaves, self.is_data, strict=True)
        ]
        args, kwargs, conditioned = jax.tree_util.tree_unflatten(self.treedef, leaves)
        outer = tuple(_with_data(c, d) for c, d in zip(run.conditions, conditioned, strict=True))
        return run._replace(args=args, kwargs=kwargs, conditions=outer)


def _with_data(handler: Any, data: Any) -> Any:
    return type(handler)(data=data, condition_fn=handler.condition_fn)


def compile_program(run: Run, arguments: Arguments, guiding: Guiding) -> Program:
    """Trace and compile the density of a model along references."""
    users: list[Any] = []
    given: set[str] = set()
    fixed: set[str] = set()

    def with_paths(run: Run, draw: Callable[..., Array]) -> Any:
        def config(site: Any) -> Any:
            chosen = run.config(site)
            if not guiding.is_owner(chosen):
                return chosen
            if not any(chosen is user for user in users):
                users.append(chosen)
            if not isinstance(chosen.reference, str):
                given.add(site["name"])
            return _Along(chosen, draw)

        return run.conditioned(reparam(run.fn, config=config))

    def start(data: list[Any], careful: bool) -> tuple[Any, Any, Any]:
        """Unconstrained values of all sites, first references, and whether all was seen."""
        z: dict[str, Array] = {}
        references: dict[str, Array] = {}
        seen = [jnp.array(True)]

        def draw(owner: Any, name: str, site: Any, run: Run) -> Array:
            path, references[name], sees = guiding.first(owner, name, site, run, careful)
            seen.append(jnp.all(sees))
            return path

        def value(site: Any) -> Any:
            return _first_value(site, users, z, fixed)

        now = arguments.run_with(run, data)
        model = substitute(seed(with_paths(now, draw), 0), substitute_fn=value)
        model(*now.args, **now.kwargs)
        z = {name: jnp.asarray(u, jnp.result_type(float)) for name, u in z.items()}
        return z, references, jnp.all(jnp.stack(seen))

    def objective(z: Any, references: Any, data: list[Any]) -> tuple[Array, Any]:
        found: dict[str, Any] = {}
        log_det: dict[str, Array] = {}  # a site may be asked for again, to look ahead

        def draw(owner: Any, name: str, site: Any, run: Run) -> Array:
            path, (guide, states) = guiding.along(owner, name, site, run, references[name])
            found[name] = (states, guide)
            return path

        def value(site: Any) -> Any:
            u = z.get(site["name"])
            if u is None or site["type"] != "sample" or site["is_observed"]:
                return None
            transform = biject_to(site["fn"].support)
            value = transform(u)
            log_det[site["name"]] = jnp.sum(transform.log_abs_det_jacobian(u, value))
            return value

        now = arguments.run_with(run, data)
        model = substitute(seed(with_paths(now, draw), 0), substitute_fn=value)
        log_joint, _ = log_density(model, now.args, now.kwargs, {})
        return -(log_joint + sum(log_det.values(), jnp.zeros(()))), found

    # Compiled ahead of time: a compiled function runs at once, also inside an outer trace.
    data = arguments.data
    jitted = jax.jit(start, static_argnums=1)
    traced = jitted.trace(data, False)
    starts: dict[bool, Any] = {False: traced.lower().compile()}

    def start_at(data: list[Any], careful: bool) -> tuple[Any, Any]:
        if careful not in starts:
            starts[careful] = jitted.lower(data, careful).compile()
        z, references, seen = starts[careful](data)
        return (z, references) if careful or bool(seen) else start_at(data, True)

    z, references, _ = traced.out_info
    both = jax.jit(jax.value_and_grad(objective, has_aux=True))
    gradient = both.lower(z, references, data).compile()
    shared = (frozenset(fixed), frozenset(given), tuple(users))
    return Program(arguments.key(), start_at, gradient, *shared)


def _first_value(site: Any, users: list[Any], z: dict[str, Any], fixed: set[str]) -> Any:
    """Where a site starts: at the user's value, its median, or zero for innovations."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    name, law = site["name"], site["fn"]
    if is_innovation(name):
        value = jnp.zeros(law.shape())
        fixed.add(name)
    else:
        plugged = [user.at[name] for user in users if user.at is not None and name in user.at]
        if plugged:
            value = jnp.asarray(plugged[0], jnp.result_type(float))
            fixed.add(name)
        else:
            value = _median(site)
    if value is None or law.support.is_discrete:
        return value
    z[name] = biject_to(law.support).inv(value)
    return value


def _median(site: Any) -> Any:
    """The median of a law, of draws where it does not know its own."""
    law = site["fn"]
    if law.event_dim == 0:
        try:
            value = law.icdf(jnp.full(law.shape(), 0.5))
        except (NotImplementedError, AttributeError, ImportError):
            value = None
        if value is not None:
            return value
    return init_to_median(site, num_samples=15)


@contextmanager
def collecting() -> Iterator[list[Found]]:
    """Collect what is found, or has been found before, for the models that are run inside."""
    found: list[Found] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting[:] = [other for other in _collecting if other is not found]


def is_collected() -> bool:
    """Whether a model is run only to collect what is found: its paths are not looked at."""
    return bool(_collecting)


def note(found: Found) -> None:
    """Say what was found to those who collect it."""
    for others in _collecting:
        if not any(other is found for other in others):
            others.append(found)


def search(program: Program, data: list[Any]) -> Found:
    """Alternate between parameters that fit best and the guided paths at them."""
    with searching():
        return _searched(program, data)


def _searched(program: Program, data: list[Any]) -> Found:
    from scipy.optimize import minimize  # slow to import

    first, references = jax.tree.map(np.asarray, program.start(data, False))
    if not np.isfinite(program.gradient(first, references, data)[0][0]):
        first, references = jax.tree.map(np.asarray, program.start(data, True))
    # What is searched over, and what is free: values that the user gave stay where they are.
    free = tuple(sorted(name for name in first if not is_innovation(name)))
    names = tuple(name for name in free if name not in program.fixed)

    def place(flat: np.ndarray, names: tuple[str, ...] = names) -> dict[str, np.ndarray]:
        ends = np.cumsum([0, *(first[name].size for name in names)])
        parts = zip(names, ends[:-1], ends[1:], strict=True)
        moved = {n: flat[a:b].reshape(first[n].shape).astype(first[n].dtype) for n, a, b in parts}
        return {**first, **moved}

    def evaluate(flat: np.ndarray, names: tuple[str, ...] = names) -> tuple[float, Any, np.ndarray]:
        (value, found), slope = program.gradient(place(flat, names), references, data)
        flat_slope = [np.ravel(np.asarray(slope[name], np.float64)) for name in names]
        return float(value), found, np.concatenate([np.zeros(0), *flat_slope])

    def on_host(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, _, slope = evaluate(flat)
        return (value if np.isfinite(value) else 1e30), np.nan_to_num(slope)

    def joined(z: dict[str, Any], names: tuple[str, ...]) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(np.ravel(z[n]) for n in names)]).astype(np.float64)

    best = joined(first, names)

    def settle(flat: np.ndarray) -> float:
        """Move the references to the guided paths at some parameters; the density along them."""
        nonlocal references
        for _ in range(_MOVES):
            references = _moved(jax.tree.map(np.asarray, evaluate(flat)[1]), program.given)
        return evaluate(flat)[0]

    # The first reference may be no path of the model: its guided path is.
    value = settle(best)
    for _ in range(_ROUNDS if best.size else 0):
        options = {"maxiter": _STEPS}
        trial = minimize(on_host, best, jac=True, method="L-BFGS-B", options=options).x
        # Far from its reference a guide flatters: a step must hold along paths of its own.
        before, reached = references, settle(trial)
        for _ in range(_HALVINGS):
            if reached <= value:
                break
            trial, references = 0.5 * (best + trial), before
            reached = settle(trial)
        gained = value - reached
        if not gained > 0.0:
            settle(best)
            break
        best, value = trial, reached
        if gained < _SETTLED:
            break
    found = jax.tree.map(np.asarray, evaluate(best)[1])
    covariance, whole = None, joined(place(best), free)
    if 0 < whole.size <= _MOST_FREE:
        covariance = inverse_curvature(lambda flat: evaluate(flat, free)[2], whole)

    def gradient(z: Any) -> tuple[Any, Any]:
        (value, _), slope = program.gradient(z, references, data)
        return value, slope

    plans = {name: Plan(*guide) for name, (_, guide) in found.items()}
    return Found(plans, place(best), free, covariance, gradient)


def _moved(found: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """The guided paths as the next references; those given, and what is not finite, stay."""
    return {
        name: guide.reference if name in given or not np.all(np.isfinite(states)) else states
        for name, (states, guide) in found.items()
    }


def inverse_curvature(
    gradient: Callable[[np.ndarray], np.ndarray], x: Float[np.ndarray, " D"]
) -> Float[np.ndarray, "D D"] | None:
    """Inverse Hessian by differences of gradients; at most 1 in directions that are flat.

    Unconstrained values have priors of unit scale or so: where the density is flat or concave the
    wrong way, that scale is taken. None where a gradient is not finite.

    Example:
        >>> inverse_curvature(lambda x: np.array([4.0, 0.25]) * x, np.zeros(2)).round(3).tolist()
        [[0.25, 0.0], [0.0, 1.0]]
    """
    rows = [
        (gradient(x + step) - gradient(x - step)) / (2.0 * _DIFFERENCE)
        for step in _DIFFERENCE * np.eye(x.size)
    ]
    hessian = 0.5 * (np.array(rows) + np.array(rows).T)
    if not np.all(np.isfinite(hessian)):
        return None
    values, vectors = np.linalg.eigh(hessian)
    return (vectors / np.maximum(values, 1.0)) @ vectors.T
