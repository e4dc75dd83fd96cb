"""Gaussian processes by their values at inducing points."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.fields.gaussian import AbstractGaussianPrior
from numpyro_sde.fields.kernels import check_kernel, covariance


class InducingGP(AbstractGaussianPrior):
    """Gaussian process given its values at inducing points.

    `f(x) = k(x, Z) R^-T v`, `R R' = k(Z, Z)`, `v ~ N(0, I)`. What the process does between the
    points beyond that is left out, so bands are too narrow a length and more away from every
    point: put points wherever data are, closer than the length (Quinonero-Candela and Rasmussen
    2005, "subset of regressors").

    Args:
        points: inducing points, shape `(m,)` or `(m, dim)`, in units of the state.
        kernel: "se", "matern32" or "matern52".
        outputs: None for scalar values; d for vectors of d independent processes.

    Raises:
        ValueError: points that are not finite or not such an array, an unknown kernel.

    When not to use it: up to three dimensions on a box, where `HSGP` leaves nothing out.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro_sde as nsde
        >>> prior = nsde.fields.InducingGP(np.linspace(-2.0, 2.0, 9))
        >>> f = prior.from_weights(jnp.zeros(9), amplitude=1.0, length=1.0)
        >>> round(float(f.prior_sd(0.3)), 2)
        1.0
    """

    dim: int = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    kernel: str = eqx.field(static=True)
    points: tuple[tuple[float, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        points: Float[ArrayLike, "m *dim"],
        kernel: str = "se",
        *,
        outputs: int | None = None,
    ) -> None:
        places = np.asarray(points, float)
        if places.ndim not in (1, 2) or not places.size or not np.all(np.isfinite(places)):
            raise ValueError(
                f"points must be finite, of shape (m,) or (m, dim), got shape {places.shape}"
            )
        places = places.reshape(len(places), -1)
        if outputs is not None:
            at_least("outputs", outputs, 1)
        check_kernel(kernel)
        self.dim, self.outputs, self.kernel = places.shape[1], outputs, kernel
        self.points = tuple(map(tuple, places.tolist()))

    @property
    def vector_features(self) -> bool:
        return False

    @property
    def num_weights(self) -> int:
        return len(self.points)

    @property
    def own_ranks(self) -> tuple[int, ...]:
        return (1, 2)

    def prepare(self, length: Array) -> tuple[Array, tuple[Array, ...]]:
        places = jnp.asarray(self.points, length.dtype) / length[None]
        K = covariance(self.kernel, jnp.sum((places[:, None] - places[None]) ** 2, -1))
        # Points closer than the length make K singular to rounding.
        jitter = 100.0 * jnp.finfo(K.dtype).eps * len(self.points)
        root = jnp.linalg.cholesky(K + jitter * jnp.eye(len(K), dtype=K.dtype))
        return jnp.ones(len(K), K.dtype), (length, root)

    def features(self, x: Array, own: tuple[Array, ...]) -> Array:
        length, root = own
        places = jnp.asarray(self.points, x.dtype)
        k = covariance(self.kernel, jnp.sum(((places - x[None]) / length[None]) ** 2, -1))
        return jax.scipy.linalg.solve_triangular(root, k, lower=True)

    def largest_features(self, own: tuple[Array, ...]) -> Array:
        # Their squares sum to the prior variance that the points explain, at most one.
        return jnp.ones(len(self.points), own[0].dtype)
