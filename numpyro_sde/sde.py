"""The stochastic differential equation itself: coefficients, parameters and their batching.

`dX = drift(t, X) dt + diffusion(t, X) dW`, written for ONE state of ONE process. Parameters
are array leaves with declared event dimensions, so that a plate of processes is the same
object with longer leaves; code is static. A path law maps over both (`distributions.path`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.linear.small import cholesky
from numpyro_sde.noise import AbstractNoise, Brownian

if TYPE_CHECKING:
    from numpyro_sde.schemes.base import AbstractScheme

_ARRAYS = (jax.Array, np.ndarray, np.generic)


class Structure(NamedTuple):
    """How Brownian motions enter: read off the diffusion's shape, never declared.

    Attributes:
        state_shape: `()` or `(d,)`.
        kind: "diagonal" where each component has its own independent noise (every scalar
            process is so, whatever the number of its Brownian motions), else "general".
        diffusion_shape: the shape that `diffusion` returns.
        innovation_shape: shape of the standard normals that drive one Gaussian step.
    """

    state_shape: tuple[int, ...]
    kind: Literal["diagonal", "general"]
    diffusion_shape: tuple[int, ...]
    innovation_shape: tuple[int, ...]


class Code(eqx.Module):
    """A user's function: array leaves are data, everything else is static.

    Plain functions are static, compared by identity. Callable pytrees (an Equinox network, a
    `jax.tree_util.Partial`) keep their arrays traced, shared by all series.
    """

    arrays: tuple[Any, ...]
    static: Any = eqx.field(static=True)

    def __init__(self, fn: Callable[..., Any]) -> None:
        arrays, static = eqx.partition(fn, eqx.is_array)
        leaves, treedef = jax.tree_util.tree_flatten(arrays, is_leaf=lambda x: x is None)
        self.arrays = tuple(leaves)
        rest, rest_def = jax.tree_util.tree_flatten(static, is_leaf=lambda x: x is None)
        self.static = (treedef, tuple(rest), rest_def)

    @property
    def function(self) -> Callable[..., Any]:
        """The callable, with its current arrays."""
        treedef, rest, rest_def = self.static
        arrays = jax.tree_util.tree_unflatten(treedef, self.arrays)
        static = jax.tree_util.tree_unflatten(rest_def, rest)
        return cast("Callable[..., Any]", eqx.combine(arrays, static))

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Parameters(eqx.Module):
    """A pytree of parameters with declared event dimensions.

    Leaves of plain containers have 0 event dimensions unless `event_dims` says otherwise;
    arrays inside an Equinox module (network weights) are one event each. Leading dimensions
    are batch dimensions.

    Args:
        tree: arrays and numbers in dicts, lists, tuples or Equinox modules; None for none.
        event_dims: an int for all leaves, or a mapping from a key of `tree` to an int (or to
            None: the whole array is the event, whatever its rank) or to a nested mapping.
        owner: what to call the argument in errors.

    Raises:
        TypeError: a leaf that is neither an array nor a number.
        ValueError: an unknown key in `event_dims`, or a leaf of too few dimensions.
    """

    leaves: tuple[Any, ...]
    event_dims: tuple[int, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    static: Any = eqx.field(static=True)

    def __init__(self, tree: Any, event_dims: Any = None, owner: str = "params") -> None:
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        _check_keys(tree, event_dims, owner)
        leaves, dims, names, rest = [], [], [], []
        for path, leaf in flat:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if not isinstance(leaf, (*_ARRAYS, bool, int, float)):
                if any(isinstance(k, jax.tree_util.GetAttrKey) for k in path):
                    rest.append(leaf)  # an activation function inside a network
                    continue
                raise TypeError(
                    f"{owner}[{name!r}] must be an array or a number, got {type(leaf).__name__}; "
                    "functions belong in drift and diffusion"
                )
            rest.append(None)
            array = leaf if isinstance(leaf, jax.Array | np.ndarray) else jnp.asarray(leaf)
            declared = _declared_event_dim(path, event_dims)
            dim = array.ndim if declared is None else declared
            if dim > array.ndim:
                raise ValueError(
                    f"event_dims of {owner}[{name!r}] is {dim} but the array has shape "
                    f"{array.shape}: give it at least {dim} dimension(s)"
                )
            leaves.append(array)
            dims.append(int(dim))
            names.append(name)
        self.leaves, self.event_dims, self.names = tuple(leaves), tuple(dims), tuple(names)
        self.static = (treedef, tuple(rest))

    @property
    def tree(self) -> Any:
        """The parameters in the structure in which they were given."""
        treedef, rest = self.static
        arrays = iter(self.leaves)
        return jax.tree_util.tree_unflatten(
            treedef, [next(arrays) if r is None else r for r in rest]
        )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Broadcast of the leading dimensions of all leaves."""
        shapes = {
            name: jnp.shape(leaf)[: jnp.ndim(leaf) - dim]
            for name, leaf, dim in zip(self.names, self.leaves, self.event_dims, strict=True)
        }
        return broadcast_batch(shapes)

    @property
    def batch_hint(self) -> str:
        """What to add to an error that undeclared event dimensions may have caused."""
        leaves = zip(self.names, self.leaves, self.event_dims, strict=True)
        batched = [f"{n!r} of shape {jnp.shape(a)}" for n, a, dim in leaves if jnp.ndim(a) > dim]
        if not batched:
            return ""
        return (
            f" (leading dimensions of params {', '.join(batched)} are read as batch "
            "dimensions; declare those of one process in event_dims)"
        )


def _declared_event_dim(path: tuple[Any, ...], event_dims: Any) -> int | None:
    inside_module = any(isinstance(k, jax.tree_util.GetAttrKey) for k in path)
    declared = event_dims
    for key in path:
        if not isinstance(declared, Mapping):
            break
        # A module declares as a whole; a container's leaf defaults to no event dimension.
        name = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        declared = declared.get(name, "default")
    if declared is None and event_dims is not None:
        return None
    if isinstance(declared, int) and not isinstance(declared, bool):
        if declared < 0:
            raise ValueError(f"event_dims must be >= 0, got {declared}")
        return declared
    return None if inside_module else 0


def _check_keys(tree: Any, event_dims: Any, owner: str) -> None:
    if event_dims is None or isinstance(event_dims, int):
        return
    if not isinstance(event_dims, Mapping):
        raise TypeError(
            f"event_dims must be an int or a mapping from keys of {owner} to ints, got "
            f"{type(event_dims).__name__}"
        )
    if not isinstance(tree, Mapping):
        raise ValueError(f"event_dims names {sorted(map(str, event_dims))} but {owner} has no keys")
    for key, value in event_dims.items():
        if key not in tree:
            raise ValueError(
                f"event_dims names {key!r}, which is not in {owner} "
                f"(it has {sorted(map(str, tree))})"
            )
        if isinstance(value, Mapping):
            _check_keys(tree[key], value, f"{owner}[{key!r}]")
        elif value is not None and not isinstance(value, int):
            raise TypeError(f"event_dims[{key!r}] must be an int, got {type(value).__name__}")


def broadcast_batch(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Broadcast named batch shapes, or name the two that do not fit together."""
    total: tuple[int, ...] = ()
    so_far: list[str] = []
    for name, shape in shapes.items():
        try:
            total = jnp.broadcast_shapes(total, shape)
        except ValueError as error:
            raise ValueError(
                f"batch shape {shape} of {name} does not broadcast with {total} of "
                f"{', '.join(so_far)}. Dimensions that belong to one process (a matrix, a "
                "vector) must be declared in event_dims, or with to_event on a distribution"
            ) from error
        if shape:
            so_far.append(name)
    return total


def as_function(
    fn: Any, role: str, arguments: str, optional: Mapping[str, tuple[str, bool]]
) -> Code:
    """Check that `fn` can be called with the arguments that it will get.

    Args:
        fn: the user's function.
        role: what to call it in errors.
        arguments: the arguments it always gets, such as "t, x".
        optional: for each further argument its letter: the name of the keyword that brings it,
            and whether that was given.

    Raises:
        TypeError: not a callable, or a callable of other arguments.
    """
    wanted = ", ".join([arguments, *(letter for letter, (_, given) in optional.items() if given)])
    if not callable(fn):
        raise TypeError(f"{role} must be a function of ({wanted}), got {type(fn).__name__}")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin without a signature
        return Code(fn)
    try:
        signature.bind(*(None,) * len(wanted.split(",")))
    except TypeError:
        why = " and ".join(
            f"{keyword} was {'given' if given else 'not given'}"
            for keyword, given in optional.values()
        )
        raise TypeError(
            f"{role} must take ({wanted}) because {why}, got a function of {signature}"
        ) from None
    return Code(fn)


class SDE(eqx.Module):
    """A stochastic differential equation `dX = drift dt + diffusion dW`.

    Write drift and diffusion for one state of one process; what varies over a plate goes
    through `params`. Subclass it for a named process (`nsde.processes`).

    Args:
        drift: `drift(t, x, p)`, state units per time; returns the shape of `x`, which is `()`
            or `(d,)`. Without `params`, `drift(t, x)`.
        diffusion: `diffusion(t, x, p)`, state units per square root of time; returns a scalar
            or the shape of `x` (independent noise for each component), or shape
            `(*state, m)` for m Brownian motions that all components share.
        params: pytree of arrays, handed to both functions as `p`.
        event_dims: dimensions of each parameter that belong to one process, by key (default 0
            each; `{"A": 2}` for a matrix). Leading dimensions are the batch.
        noise: the driving noise.
        interpretation: "ito" or "stratonovich".

    Raises:
        TypeError: coefficients that are no functions of the right arguments, or parameters
            that are no arrays.
        ValueError: an unknown interpretation, or event dimensions that do not fit.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(
        ...     drift=lambda t, x, p: p["rate"] * (p["mean"] - x),
        ...     diffusion=lambda t, x, p: p["scale"],
        ...     params={"rate": 2.0, "mean": 1.0, "scale": 0.5},
        ... )
        >>> float(sde.drift_at(0.0, 0.5))
        1.0
    """

    parameters: Parameters
    drift: Code
    diffusion: Code
    noise: AbstractNoise
    interpretation: str = eqx.field(static=True)

    def __init__(
        self,
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        *,
        params: Any = None,
        event_dims: Any = None,
        noise: AbstractNoise | None = None,
        interpretation: str = "ito",
    ) -> None:
        if interpretation not in ("ito", "stratonovich"):
            raise ValueError(
                f"interpretation must be 'ito' or 'stratonovich', got {interpretation!r}"
            )
        noise = Brownian() if noise is None else noise
        if not isinstance(noise, AbstractNoise):
            raise TypeError(
                f"noise must be a driving noise such as nsde.noise.Brownian(), got "
                f"{type(noise).__name__}"
            )
        self.parameters = Parameters(params, event_dims)
        optional = {"p": ("params", params is not None)}
        self.drift = as_function(drift, "drift", "t, x", optional)
        self.diffusion = as_function(diffusion, "diffusion", "t, x", optional)
        self.noise = noise
        self.interpretation = interpretation

    @property
    def params(self) -> Any:
        """The parameters, in the structure in which they were given."""
        return self.parameters.tree

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the parameters and of the noise."""
        return broadcast_batch(
            {"params": self.parameters.batch_shape, "noise": self.noise.batch_shape}
        )

    def driven_by(self, noise: AbstractNoise) -> SDE:
        """The same equation with another driving noise.

        Raises:
            TypeError: a noise that is none.
        """
        if not isinstance(noise, AbstractNoise):
            raise TypeError(
                f"noise must be a driving noise such as nsde.noise.Brownian(), got "
                f"{type(noise).__name__}"
            )
        new = object.__new__(type(self))
        for field in dataclasses.fields(self):
            value = noise if field.name == "noise" else getattr(self, field.name)
            object.__setattr__(new, field.name, value)
        return new

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        leaves = jax.tree_util.tree_leaves(self)
        dims = list(self.parameters.event_dims)
        last = self.noise.leaf_event_dims()
        # Arrays of callables (network weights) are shared by all series: all event.
        whole = leaves[len(dims) : len(leaves) - len(last)]
        return dims + [jnp.ndim(leaf) for leaf in whole] + last

    def exact_transition(self) -> AbstractScheme | None:
        """The exact transition law, for named processes that have one."""
        return None

    def default_transition(self) -> AbstractScheme | None:
        """The transition law where none is named; None for `Euler()`."""
        return self.exact_transition()

    @property
    def positive(self) -> bool:
        """Whether the state of the exact process stays above zero."""
        return False

    def _call(self, fn: Code, t: Any, x: Any) -> Any:
        args = () if self.params is None else (self.params,)
        return fn(t, x, *args)

    def drift_at(self, t: Any, x: Any) -> Array:
        """Drift of an unbatched process at one state, as given (no Ito correction)."""
        return jnp.asarray(self._call(self.drift, t, x))

    def diffusion_at(self, t: Any, x: Any) -> Array:
        """Diffusion of an unbatched process at one state, shape as `diffusion` returns it."""
        return jnp.asarray(self._call(self.diffusion, t, x))

    def ito_drift_at(self, t: Any, x: Any) -> Array:
        """Ito drift of an unbatched process at one state.

        A Stratonovich SDE gains `1/2 sum_jk L_kj d_k L_ij` (Kloeden and Platen 1992, 4.9).
        """
        drift = self.drift_at(t, x)
        if self.interpretation == "ito":
            return drift
        x = jnp.asarray(x)
        columns = self.diffusion_columns_at(t, x)
        for j in range(columns.shape[-1]):
            _, along = jax.jvp(lambda s: self.diffusion_columns_at(t, s), (x,), (columns[..., j],))
            drift = drift + 0.5 * along[..., j]
        return drift

    def diffusion_columns_at(self, t: Any, x: Any) -> Array:
        """Diffusion as a matrix `(*state, m)`, one column for each Brownian motion."""
        x = jnp.asarray(x)
        value = self.diffusion_at(t, x)
        if value.ndim > x.ndim:
            return value
        full = jnp.broadcast_to(value, x.shape)
        return full[None] if x.ndim == 0 else jnp.diag(full)

    def noise_factor_at(self, t: Any, x: Any) -> Array:
        """A factor of the instantaneous covariance `L L'` that standard normals can drive.

        Shape of the state where components are independent; else lower triangular `(d, d)`,
        or `(d, m)` with fewer noises than states.
        """
        x = jnp.asarray(x)
        value = self.diffusion_at(t, x)
        if value.ndim <= x.ndim:
            return jnp.broadcast_to(value, x.shape)
        if x.ndim == 0:
            return jnp.abs(value[0]) if value.size == 1 else jnp.sqrt(jnp.sum(value**2))
        if value.shape[1] < value.shape[0]:
            return value
        return cholesky(value @ value.T)

    def structure(self, state_shape: tuple[int, ...]) -> Structure:
        """Read off how the noise enters, checking the shapes of both coefficients.

        Raises:
            ValueError: a drift or diffusion whose shape does not fit the state's.
        """
        if len(state_shape) > 1:
            raise ValueError(f"a state must have shape () or (d,), got {state_shape}")
        one = self.unbatched_shapes()
        x = jax.ShapeDtypeStruct(state_shape, jnp.result_type(float))
        t = jax.ShapeDtypeStruct((), jnp.result_type(float))
        shapes = {}
        for role in ("drift", "diffusion"):
            out = self._eval_shape(one, role, t, x)
            if len(jax.tree_util.tree_leaves(out)) != 1 or not hasattr(out, "shape"):
                raise ValueError(
                    f"{role} must return one array, got {type(out).__name__}: use jnp.stack"
                )
            shapes[role] = tuple(out.shape)
        if shapes["drift"] != state_shape:
            raise ValueError(
                f"drift must return the shape of the state {state_shape}, got {shapes['drift']}"
                f"{self.parameters.batch_hint}"
            )
        got = shapes["diffusion"]
        if got in ((), state_shape):
            return Structure(state_shape, "diagonal", got, state_shape)
        if got[:-1] == state_shape and len(got) == len(state_shape) + 1 and got[-1] > 0:
            if state_shape == ():
                return Structure(state_shape, "diagonal", got, ())
            return Structure(state_shape, "general", got, (min(got[-1], state_shape[0]),))
        raise ValueError(
            f"diffusion must return a scalar, the shape of the state {state_shape}, or "
            f"{(*state_shape, 'm')} for m Brownian motions, got {got}{self.parameters.batch_hint}"
        )

    def _eval_shape(self, one: SDE, role: str, t: Any, x: Any) -> Any:
        try:
            return jax.eval_shape(lambda s, t, x: s._call(getattr(s, role), t, x), one, t, x)
        except (TypeError, ValueError, IndexError) as error:
            hint = self.parameters.batch_hint
            if not hint:
                raise
            raise ValueError(
                f"{role} fails on a state of shape {x.shape}: {error}{hint}"
            ) from error

    def unbatched_shapes(self) -> SDE:
        """This SDE with shapes in place of arrays, batch dimensions removed."""
        leaves, treedef = jax.tree_util.tree_flatten(self)
        one = [
            jax.ShapeDtypeStruct(jnp.shape(leaf)[jnp.ndim(leaf) - dim :], jnp.result_type(leaf))
            for leaf, dim in zip(leaves, self.leaf_event_dims(), strict=True)
        ]
        return cast("SDE", jax.tree_util.tree_unflatten(treedef, one))
