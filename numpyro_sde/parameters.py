"""Users' functions and their parameters: code is static, arrays have declared event dimensions.

A function is written for one process; a plate of processes is the same object with longer leaves.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_sde.runtime.entry import Held
from numpyro_sde.site_guard import refuse_sites

_ARRAYS = (jax.Array, np.ndarray, np.generic)


class Code(eqx.Module):
    """A user's function: array leaves are data, everything else is static.

    Plain functions are static, compared by their code and what they hold. Callable pytrees (an
    Equinox network, a `jax.tree_util.Partial`) keep their arrays traced, shared by all series.
    """

    arrays: tuple[Any, ...]
    static: Any = eqx.field(static=True)
    holds_function: ClassVar[bool] = True

    def __init__(self, fn: Callable[..., Any]) -> None:
        arrays, static = eqx.partition(fn, eqx.is_array)
        leaves, treedef = jax.tree_util.tree_flatten(arrays, is_leaf=lambda x: x is None)
        self.arrays = tuple(leaves)
        rest, rest_def = jax.tree_util.tree_flatten(static, is_leaf=lambda x: x is None)
        self.static = (treedef, tuple(Held(leaf) for leaf in rest), rest_def)

    @property
    def function(self) -> Callable[..., Any]:
        """The callable, with its current arrays."""
        treedef, rest, rest_def = self.static
        arrays = jax.tree_util.tree_unflatten(treedef, self.arrays)
        static = jax.tree_util.tree_unflatten(rest_def, [held.value for held in rest])
        return cast("Callable[..., Any]", eqx.combine(arrays, static))

    def __call__(self, *args: Any) -> Any:
        with refuse_sites():
            return self.function(*args)


class OwnRanks(eqx.Module):
    """A module that says which dimensions of its arrays belong to one process.

    Leading dimensions beyond them are the batch, as of a plain array with `event_dims`.
    """

    @property
    @abc.abstractmethod
    def leaf_ranks(self) -> list[int | None]:
        """Event dimensions of each leaf in flattening order; None for what is no array."""


def _ranks_of_owners(tree: Any) -> list[int | None]:
    """For each leaf of a tree, what the module that holds it says of its dimensions, or None."""
    found: list[int | None] = []
    for node in jax.tree_util.tree_leaves(tree, is_leaf=lambda n: isinstance(n, OwnRanks)):
        found.extend(node.leaf_ranks if isinstance(node, OwnRanks) else [None])
    return found


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
        for (path, leaf), owned in zip(flat, _ranks_of_owners(tree), strict=True):
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
            declared = owned if owned is not None else _declared_event_dim(path, event_dims)
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
        ValueError: a callable of state and time in the wrong order, by their names.
    """
    wanted = ", ".join([arguments, *(letter for letter, (_, given) in optional.items() if given)])
    if not callable(fn):
        raise TypeError(f"{role} must be a function of ({wanted}), got {type(fn).__name__}")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin without a signature
        return Code(fn)
    names = list(signature.parameters)[:2]
    if len(names) == 2 and names[0] in ("x", "state") and names[1] in ("t", "time"):
        raise ValueError(
            f"{role} must take ({wanted}), the time first, got a function of {signature}: with the "
            "two swapped it would run and mean something else"
        )
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
