"""Gaussian processes by random Fourier features: any number of dimensions, no box."""

from __future__ import annotations

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.fields.gaussian import AbstractGaussianPrior
from numpyro_sde.fields.kernels import HALF_INTEGER, check_kernel


class RFF(AbstractGaussianPrior):
    """Gaussian process as a sum of cosines of random frequencies, without a box.

    `f(x) = sum_j w_j sqrt(2 / m) cos(omega_j . x / length + b_j)`, `w_j ~ N(0, amplitude^2)`; the
    frequencies are drawn once from the kernel's spectral density (Rahimi and Recht 2007).
    The covariance is the kernel's up to an error of order `1 / sqrt(m)`, and the band away from
    data is that of the finite sum: take `m` large against the volume of the data in lengths.

    Args:
        dim: coordinates of a state.
        num: number of features m.
        kernel: "se", "matern32" or "matern52".
        outputs: None for scalar values; d for vectors of d independent processes.
        seed: of the frequencies; part of the prior, so keep it.

    Raises:
        ValueError: sizes below one, an unknown kernel.

    When not to use it: up to three dimensions on a known box, where `HSGP` is far more accurate for
    as many weights.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> prior = nsde.fields.RFF(dim=5, num=100, outputs=5)
        >>> f = prior.from_weights(jnp.zeros((5, 100)), amplitude=1.0, length=2.0)
        >>> f(jnp.ones(5)).shape
        (5,)
    """

    dim: int = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    kernel: str = eqx.field(static=True)
    num: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        num: int = 100,
        kernel: str = "se",
        *,
        outputs: int | None = None,
        seed: int = 0,
    ) -> None:
        at_least("dim", dim, 1)
        at_least("num", num, 1)
        if outputs is not None:
            at_least("outputs", outputs, 1)
        check_kernel(kernel)
        self.dim, self.num, self.kernel, self.seed = int(dim), int(num), kernel, int(seed)
        self.outputs = outputs

    @property
    def vector_features(self) -> bool:
        return False

    @property
    def num_weights(self) -> int:
        return self.num

    @property
    def own_ranks(self) -> tuple[int, ...]:
        return (2, 1)

    def prepare(self, length: Array) -> tuple[Array, tuple[Array, ...]]:
        rng = np.random.default_rng(self.seed)
        waves = rng.normal(size=(self.num, self.dim))
        phases = rng.uniform(0.0, 2.0 * np.pi, self.num)
        if self.kernel != "se":
            # A Matern kernel's spectral density is Student's t with 2 nu degrees of freedom.
            degrees = 2.0 * HALF_INTEGER[self.kernel]
            waves = waves / np.sqrt(rng.chisquare(degrees, (self.num, 1)) / degrees)
        own = (
            jnp.asarray(waves, length.dtype) / length[None],
            jnp.asarray(phases, length.dtype),
        )
        return jnp.ones(self.num, length.dtype), own

    def features(self, x: Array, own: tuple[Array, ...]) -> Array:
        waves, phases = own
        return math.sqrt(2.0 / self.num) * jnp.cos(waves @ x + phases)

    def largest_features(self, own: tuple[Array, ...]) -> Array:
        return jnp.full(self.num, math.sqrt(2.0 / self.num), own[0].dtype)
