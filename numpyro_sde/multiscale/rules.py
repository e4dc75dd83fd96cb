"""Nodes and weights for averages over the fast variable, fixed before tracing.

A rule gives points for the standard normal law in d dimensions; laws made from normal variables
map them. With fixed points a density stays a deterministic function of the parameters, as NUTS
needs. Sources: Golub and Welsch (1969) for Gauss rules (through NumPy); Sobol' (1967) with Owen's
(1995) scrambling (through SciPy); the first-order cut expansion of Rabitz and Alis (1999).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtri

from numpyro_sde.checks.numbers import at_least

_MOST_POINTS = 20_000


class AbstractRule(eqx.Module):
    """Nodes for averages over a fast variable."""

    def normal(self, dim: int) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
        """Points and weights for the standard normal law in `dim` dimensions."""
        raise NotImplementedError

    def spread(self, points: Array, factor: Array) -> Array:
        """Points `(n, d)` of the standard normal law taken to `N(0, factor factor')`."""
        return points @ factor.T

    def unit(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Points in (0, 1) and weights for the uniform law, dense near both ends.

        The double exponential rule of Takahasi and Mori (1974): what is mapped by a quantile
        function may grow without bound at the ends.
        """
        reach, num = 3.0, 64
        s = np.linspace(-reach, reach, num)
        inner = 0.5 * np.pi * np.sinh(s)
        points = 1.0 / (1.0 + np.exp(-2.0 * inner))
        weights = np.cosh(s) / np.cosh(inner) ** 2
        return points, weights / weights.sum()


class GaussHermite(AbstractRule):
    """Product Gauss-Hermite rule, exact for polynomials to degree `2 order - 1`.

    Args:
        order: points for each dimension; the rule has `order ** d` points.

    Raises:
        ValueError: an order below 2, or more than 20,000 points.

    Example:
        >>> from numpyro_sde.multiscale import GaussHermite
        >>> points, weights = GaussHermite(3).normal(1)
        >>> points.round(4).ravel().tolist(), float((weights * points[:, 0] ** 4).sum().round(6))
        ([-1.7321, 0.0, 1.7321], 3.0)
    """

    order: int = eqx.field(static=True, default=32)

    def __check_init__(self) -> None:
        at_least("order", self.order, 2)

    def normal(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        if self.order**dim > _MOST_POINTS:
            raise ValueError(
                f"quadrature=GaussHermite({self.order}) has {self.order}^{dim} points for "
                f"{dim} fast coordinates, more than {_MOST_POINTS}: use QuasiMonteCarlo, or "
                "Coordinatewise where the coefficients are sums over coordinates"
            )
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.order)
        weights = weights / weights.sum()
        points = np.array(list(itertools.product(nodes, repeat=dim))).reshape(-1, dim)
        product = [math.prod(w) for w in itertools.product(weights, repeat=dim)]
        return points, np.array(product)


class QuasiMonteCarlo(AbstractRule):
    """Scrambled Sobol' points mapped to the normal law, and their negatives.

    For several fast coordinates. The negatives make averages of odd functions exact.

    Args:
        num_points: number of points, a power of two of at least 4.
        seed: seed of the scrambling.

    Raises:
        ValueError: a number of points that is no power of two.

    Example:
        >>> from numpyro_sde.multiscale import QuasiMonteCarlo
        >>> points, weights = QuasiMonteCarlo(256).normal(10)
        >>> points.shape, bool(abs((points[:, 0] ** 2).mean() - 1.0) < 0.03)
        ((256, 10), True)
    """

    num_points: int = eqx.field(static=True, default=1024)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        at_least("num_points", self.num_points, 4)
        if self.num_points & (self.num_points - 1):
            raise ValueError(f"num_points must be a power of two, got {self.num_points}")

    def normal(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        from scipy.stats import qmc  # slow to import

        engine = qmc.Sobol(dim, scramble=True, seed=np.random.default_rng(self.seed))
        half = ndtri(engine.random_base2(int(math.log2(self.num_points)) - 1))
        points = np.concatenate([half, -half])
        return points, np.full(len(points), 1.0 / len(points))


class Coordinatewise(AbstractRule):
    r"""Gauss-Hermite along each fast coordinate in turn, for sums over coordinates.

    `E f(Y) = sum_i (E f(m, ..., Y_i, ..., m) - f(m)) + f(m)`, `m` the mean: exact in `Y` where `f`
    is a sum of functions of one coordinate each, as the force of independent or coupled bath
    particles is, whatever their correlations (only marginals enter). `d order` points.

    When not to use it: where the slow drift (or the square of the slow diffusion) has products
    of fast coordinates, whose covariance this rule does not see. Normal laws alone.

    Args:
        order: points for each coordinate.

    Raises:
        ValueError: an order below 2.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.multiscale import Coordinatewise
        >>> points, weights = Coordinatewise(5).normal(10)
        >>> round(float((weights * np.cos(points).sum(axis=1)).sum()), 2)  # 10 exp(-1/2)
        6.07
    """

    order: int = eqx.field(static=True, default=32)

    def __check_init__(self) -> None:
        at_least("order", self.order, 2)

    def spread(self, points: Array, factor: Array) -> Array:
        # Each coordinate by itself: the marginals are all that sums over coordinates see.
        return points * jnp.sqrt(jnp.sum(factor**2, axis=-1))[None]

    def normal(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(self.order)
        weights = weights / weights.sum()
        points = np.concatenate([np.outer(nodes, axis) for axis in np.eye(dim)])
        points = np.concatenate([np.zeros((1, dim)), points])
        return points, np.concatenate([[1.0 - dim], np.tile(weights, dim)])


class MonteCarlo(AbstractRule):
    """Fresh draws from the law at each evaluation of the model, in two independent halves.

    For stochastic optimisation, where nodes that never change would be overfitted. The Euler
    log likelihood is quadratic in the drift, so one sample mean plugged in for the drift b
    subtracts `dt Var(b) / (2 num_draws s^2)` at each step and shrinks the law that is learned;
    `average` then multiplies residuals of two independent halves, which is unbiased where the
    diffusion does not depend on the fast variable. The same draws serve all states.

    When not to use it: in NUTS, whose target must be a fixed function.

    Args:
        num_draws: number of draws, even.
        key: a random key, usually `numpyro.prng_key()` inside the model.

    Raises:
        ValueError: an odd number of draws, or fewer than 2.
        TypeError: no key (outside a seeded model `numpyro.prng_key()` gives None).

    Example:
        >>> import jax
        >>> from numpyro_sde.multiscale import MonteCarlo
        >>> MonteCarlo(64, jax.random.key(0)).num_draws
        64
    """

    num_draws: int = eqx.field(static=True)
    key_data: Array

    def __init__(self, num_draws: int, key: Array) -> None:
        at_least("num_draws", num_draws, 2)
        if num_draws % 2:
            raise ValueError(f"num_draws must be even, for two halves, got {num_draws}")
        if key is None:
            raise TypeError(
                "key must be a random key, got None: numpyro.prng_key() gives one inside a model "
                "that is seeded, and in SVI and MCMC"
            )
        self.num_draws = num_draws
        typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        # As numbers: an SDE carries its arrays through maps that know no key types.
        self.key_data = jax.random.key_data(key) if typed else key

    @property
    def key(self) -> Array:
        """The random key."""
        return jax.random.wrap_key_data(self.key_data)


def default_rule(dim: int) -> AbstractRule:
    """Gauss-Hermite in up to three dimensions, quasi-Monte Carlo beyond."""
    orders = {1: 32, 2: 16, 3: 10}
    return GaussHermite(orders[dim]) if dim in orders else QuasiMonteCarlo()


def as_rule(quadrature: Any) -> AbstractRule | None:
    """A rule from the argument `quadrature`: a rule, the order of a Gauss rule, or None.

    Raises:
        TypeError: anything else.
    """
    if quadrature is None or isinstance(quadrature, AbstractRule):
        return quadrature
    if isinstance(quadrature, int | np.integer) and not isinstance(quadrature, bool):
        return GaussHermite(int(quadrature))
    raise TypeError(
        "quadrature must be a number of nodes for each fast coordinate or a rule such as "
        f"nsde.multiscale.QuasiMonteCarlo(1024), got {quadrature!r}"
    )
