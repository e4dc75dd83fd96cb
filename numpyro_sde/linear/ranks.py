"""Arrays of different ranks brought to one, where broadcasting is meant."""

from __future__ import annotations

from jaxtyping import Array, Float


def equal_rank(*arrays: Array) -> tuple[Array, ...]:
    """Arrays with leading axes of length one, so that all have as many as the longest shape.

    What `jax.numpy` does unasked where an operation meets two ranks, said aloud: a forgotten axis
    is then an error where one was not meant.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.linear.ranks import equal_rank
        >>> [a.shape for a in equal_rank(jnp.eye(2), jnp.ones((5, 2, 2)))]
        [(1, 2, 2), (5, 2, 2)]
    """
    rank = max(a.ndim for a in arrays)
    return tuple(
        a if a.ndim == rank else a.reshape(*(1,) * (rank - a.ndim), *a.shape) for a in arrays
    )


def outer(x: Float[Array, "*batch m"], y: Float[Array, "*batch n"]) -> Array:
    """Outer product of two vectors, shapes `(..., m)` and `(..., n)`.

    Example:
        >>> import jax.numpy as jnp
        >>> outer(jnp.array([1.0, 2.0]), jnp.array([3.0])).tolist()
        [[3.0], [6.0]]
    """
    x, y = equal_rank(x, y)
    return x[..., :, None] * y[..., None, :]
