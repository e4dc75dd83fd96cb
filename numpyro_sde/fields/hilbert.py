"""Gaussian processes on a box by sines: Hilbert-space approximation, gradients, rest points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.fields.field import AbstractField, record_margin
from numpyro_sde.fields.gaussian import AbstractGaussianPrior
from numpyro_sde.fields.kernels import check_kernel, log_spectral_density
from numpyro_sde.fields.monotone import MonotoneField

Constraint = Literal["gradient", "divergence_free", "odd", "increasing", "decreasing"]
# Share of a half-width over which the field goes to zero at the edge of its box.
_RIM = 0.05
_MOST = 20_000


class HSGP(AbstractGaussianPrior):
    """Gaussian process on a box of up to three dimensions, as a sum of sines.

    `f(x) = sum_j w_j phi_j(x)`, `phi_j(x) = prod_i L_i^-1/2 sin(pi j_i (x_i - a_i) / (2 L_i))` on
    the box `[a_i, a_i + 2 L_i]`, with independent `w_j ~ N(0, S(omega_j))`, S the kernel's
    spectral density (Solin and Sarkka 2020, "Hilbert space methods for reduced-rank Gaussian
    process regression"; Riutort-Mayol et al. 2023 for box and number). Cost of a value: one
    product with the weights, however many data there are.

    Choose a box that reaches a length beyond the data on each side, and `num` so that
    `shortest_length` is below the lengths of the prior. Over the outer 5 % of the box the field
    goes to zero, and outside it is zero: there a model is left with its known part. Data of an
    observed path outside the box are an error.

    Constraints (of the function, exactly, whatever the weights):

    - `"gradient"`: `-grad Phi` of a potential with this prior, `dim` outputs. The amplitude is that
      of the potential, in units of the state squared over time.
    - `"divergence_free"`: two dimensions the rotated gradient of a stream function, three the curl
      of a vector potential; `dim` outputs.
    - `"odd"`: `f(-x) = -f(x)`; a box that is symmetric about zero.
    - `"increasing"`, `"decreasing"`: one dimension; the logarithm of the slope is the process, so
      amplitude and length are those of the log slope, and the field is not linear in its weights.

    Args:
        dim: coordinates of a state, 1 to 3; 1 takes scalar states.
        box: half-width about zero, in units of the state, or `(low, high)`; for several dimensions
            a sequence of either.
        num: sines in each dimension; a number or one a dimension.
        kernel: "se", "matern32" or "matern52".
        outputs: None for scalar values; d for vectors of d independent processes.
        constraint: one of the above, or None.
        zero_at: states at which the field is known to be zero (rest points), shape `(n,)` or
            `(n, dim)`.

    Raises:
        ValueError: sizes, boxes or constraints that do not fit.

    When not to use it: more than three dimensions (`RFF`, `Network`), data that leave any box.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> prior = nsde.fields.HSGP(dim=1, box=2.5, num=24, constraint="odd")
        >>> f = prior.from_weights(jnp.ones(12), amplitude=2.0, length=0.7)
        >>> float(jnp.abs(f(0.3) + f(-0.3))) < 1e-5
        True
        >>> round(prior.shortest_length, 3)
        0.182
    """

    dim: int = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    kernel: str = eqx.field(static=True)
    constraint: str | None = eqx.field(static=True)
    low: tuple[float, ...] = eqx.field(static=True)
    half: tuple[float, ...] = eqx.field(static=True)
    num: tuple[int, ...] = eqx.field(static=True)
    zero_at: tuple[tuple[float, ...], ...] = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        box: float | Sequence[float] | Sequence[Sequence[float]],
        num: int | Sequence[int] = 20,
        kernel: str = "se",
        *,
        outputs: int | None = None,
        constraint: Constraint | None = None,
        zero_at: ArrayLike | None = None,
    ) -> None:
        at_least("dim", dim, 1)
        if dim > 3:
            raise ValueError(
                f"HSGP takes 1 to 3 dimensions, got dim={dim}: its sines are num**dim many. Use "
                " fields.RFF or fields.Network"
            )
        check_kernel(kernel)
        self.dim, self.kernel, self.constraint = int(dim), kernel, constraint
        self.low, self.half = _box(box, self.dim)
        counts = (num,) * self.dim if isinstance(num, int) else tuple(num)
        if len(counts) != self.dim:
            raise ValueError(f"num must be one number or one for each of {dim}, got {num}")
        for count in counts:
            at_least("num", count, 1)
        if math.prod(counts) > _MOST:
            raise ValueError(f"num gives {math.prod(counts)} sines, above {_MOST}: take fewer")
        self.num = tuple(int(n) for n in counts)
        self.outputs = _outputs(self.dim, outputs, constraint, self.low, self.half)
        points = np.zeros((0, dim)) if zero_at is None else np.asarray(zero_at, float)
        self.zero_at = tuple(map(tuple, points.reshape(-1, self.dim).tolist()))
        if self.zero_at and constraint in ("increasing", "decreasing"):
            raise ValueError("zero_at does not go with a monotone field: give register a level")

    @property
    def vector_features(self) -> bool:
        return self.constraint in ("gradient", "divergence_free")

    @property
    def elementwise(self) -> bool:
        return not self.zero_at

    @property
    def shortest_length(self) -> float:
        """Length below which the sines are too few, `1.75 L / num` in the worst dimension."""
        return max(1.75 * h / n for h, n in zip(self.half, self.num, strict=True))

    @property
    def frequencies(self) -> Float[np.ndarray, "m dim"]:
        """Numbers of half waves in the box, of each sine in each dimension."""
        every = np.array(list(itertools.product(*(range(1, n + 1) for n in self.num))))
        if self.constraint == "odd":
            # About the middle of the box, a sine is even in x where its number is odd.
            every = every[(every % 2 == 0).sum(1) % 2 == 1]
        return every

    @property
    def num_weights(self) -> int:
        once = len(self.frequencies)
        return 3 * once if self.constraint == "divergence_free" and self.dim == 3 else once

    @property
    def own_ranks(self) -> tuple[int, ...]:
        return ()

    def prepare(self, length: Array) -> tuple[Array, tuple[Array, ...]]:
        waves = self.frequencies * (np.pi / 2.0 / np.array(self.half))
        squared = (jnp.asarray(waves, length.dtype) ** 2) @ length**2
        log_density = log_spectral_density(self.kernel, squared, self.dim)
        sd = jnp.exp(0.5 * (log_density + jnp.sum(jnp.log(length))))
        return jnp.tile(sd, self.num_weights // sd.size), ()

    def features(self, x: Array, own: tuple[Array, ...]) -> Array:  # noqa: ARG002
        margin = self.margin(x)
        record_margin(margin)
        share = jnp.clip(margin / _RIM, 0.0, 1.0)
        inside = share**2 * (3.0 - 2.0 * share)
        if not self.vector_features:
            return inside * self._sines(x)
        return inside * self._of_slopes(jax.jacfwd(self._sines)(x))

    def _of_slopes(self, slopes: Array) -> Array:
        """Vector features of the slopes `(m, dim)` of the sines."""
        if self.constraint == "gradient":
            return -(slopes[:, 0] if self.outputs is None else slopes.T)
        if self.dim == 2:
            return jnp.stack([slopes[:, 1], -slopes[:, 0]])
        a, b, c = slopes.T
        none = jnp.zeros_like(a)
        rows = [[none, -c, b], [c, none, -a], [-b, a, none]]
        return jnp.stack([jnp.concatenate(row) for row in rows])

    def expected_features(self, mean: Array, covariance: Array) -> Array:
        """Under a normal law: `E cos(k'x + b) = exp(-k'Pk/2) cos(k'm + b)`, sines by their sums."""

        def sines(mean: Array) -> Array:
            waves = jnp.asarray(self.frequencies * (np.pi / 2.0 / np.array(self.half)), mean.dtype)
            total = jnp.zeros(len(waves), mean.dtype)
            # prod_i sin a_i = 2^-d sum over signs s of prod(s) cos(s'a - d pi / 2)
            for signs in itertools.product((1.0, -1.0), repeat=self.dim):
                k = waves * jnp.asarray(signs, mean.dtype)[None]
                angle = k @ (mean - jnp.asarray(self.low, mean.dtype)) - self.dim * np.pi / 2.0
                damped = jnp.exp(-0.5 * jnp.sum((k @ covariance) * k, -1)) * jnp.cos(angle)
                total = total + math.prod(signs) * damped
            return total / (2.0**self.dim * math.sqrt(math.prod(self.half)))

        return self._of_slopes(jax.jacfwd(sines)(mean)) if self.vector_features else sines(mean)

    def largest_features(self, own: tuple[Array, ...]) -> Array:  # noqa: ARG002
        waves = jnp.asarray(self.frequencies * (np.pi / 2.0 / np.array(self.half)))
        sine = 1.0 / math.sqrt(math.prod(self.half))
        if not self.vector_features:
            return jnp.full(len(waves), sine)
        slopes = sine * waves.T  # of each sine along each coordinate
        if self.constraint == "gradient":
            return slopes[0] if self.outputs is None else slopes
        if self.dim == 2:
            return slopes[::-1]
        a, b, c = slopes
        none = jnp.zeros_like(a)
        return jnp.stack(
            [jnp.concatenate(row) for row in ([none, c, b], [c, none, a], [b, a, none])]
        )

    def margin(self, x: Array) -> Array:
        """Distance of a state `(dim,)` to the edge of the box, in half-widths; negative outside."""
        half = jnp.asarray(self.half, x.dtype)
        return 1.0 - jnp.max(jnp.abs(x - jnp.asarray(self.low, x.dtype) - half) / half)

    def outside_by(self, points: np.ndarray) -> float:
        """How far the farthest of known states is outside the box, in half-widths; 0 if inside."""
        half = np.array(self.half)
        place = points.reshape(-1, self.dim) - np.array(self.low) - half
        return max(float(np.max(np.abs(place) / half)) - 1.0, 0.0)

    def _sines(self, x: Array) -> Array:
        each = []
        for i, n in enumerate(self.num):
            waves = jnp.asarray(np.arange(1, n + 1) * (np.pi / 2.0 / self.half[i]), x.dtype)
            each.append(jnp.sin(waves * (x[i] - self.low[i])) / math.sqrt(self.half[i]))
        total = each[0]
        for sines in each[1:]:
            total = (total[:, None] * sines[None, :]).reshape(-1)
        if self.constraint == "odd":
            place = np.ravel_multi_index((self.frequencies - 1).T, self.num)
            total = total[place]
        return total

    def constrain(self, z: Array, sd: Array) -> Array:
        """Whitened weights given that the field is zero at the rest points, exactly."""
        if not self.zero_at:
            return z
        points = jnp.asarray(self.zero_at, z.dtype)
        rows = jax.vmap(lambda x: self.features(x, ()))(points)
        if self.vector_features:
            return _project(rows.reshape(-1, rows.shape[-1]) * sd[None], z)
        if z.ndim == 1:
            return _project(rows * sd[None], z)
        return jax.vmap(lambda z, sd: _project(rows * sd[None], z))(z, sd)

    def from_weights(
        self,
        z: Float[ArrayLike, "*outputs m"],
        *,
        amplitude: ArrayLike,
        length: ArrayLike,
    ) -> AbstractField:
        field = super().from_weights(z, amplitude=amplitude, length=length)
        if self.constraint in ("increasing", "decreasing"):
            middle = self.low[0] + self.half[0]
            return MonotoneField(field, middle, 1.0 if self.constraint == "increasing" else -1.0)
        return field


def _project(rows: Array, z: Array) -> Array:
    """Standard normal z given that `rows z = 0`."""
    # A vector feature at a point may repeat a direction: pseudo-inverse, not a solve.
    return z - jnp.linalg.pinv(rows) @ (rows @ z)


def _box(box: Any, dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lower ends and half-widths."""
    given: list[Any] = [box] * dim if isinstance(box, int | float | np.generic) else list(box)
    if dim == 1 and len(given) == 2:
        given = [given]
    ends = [np.asarray([-one, one] if np.ndim(one) == 0 else one, float) for one in given]
    if len(ends) != dim or any(one.shape != (2,) for one in ends):
        raise ValueError(
            f"box must be a half-width, (low, high), or one of these for each of {dim} "
            f"dimension(s), got {box!r}"
        )
    sides = np.stack(ends)
    if not np.all(np.isfinite(sides)) or not np.all(sides[:, 1] > sides[:, 0]):
        raise ValueError(f"box must have finite ends, the lower first, got {box!r}")
    return tuple(sides[:, 0].tolist()), tuple((np.diff(sides)[:, 0] / 2.0).tolist())


def _outputs(
    dim: int,
    outputs: int | None,
    constraint: str | None,
    low: tuple[float, ...],
    half: tuple[float, ...],
) -> int | None:
    """Number of outputs, with what a constraint says of it; errors for what does not fit."""
    if constraint is not None and constraint not in get_args(Constraint):
        raise ValueError(
            f"constraint must be None or one of {get_args(Constraint)}, got {constraint!r}"
        )
    if outputs is not None:
        at_least("outputs", outputs, 1)
    if constraint == "odd" and not np.allclose(np.add(low, half), 0.0, atol=1e-9 * max(half)):
        raise ValueError(
            f"an odd field needs a box that is symmetric about zero, got low ends {low}"
        )
    if constraint in ("increasing", "decreasing") and (dim != 1 or outputs is not None):
        raise ValueError("a monotone field is a scalar function: dim must be 1, outputs None")
    if constraint == "divergence_free" and dim == 1:
        raise ValueError("a divergence-free field of one dimension is a constant: take dim 2 or 3")
    if constraint in ("gradient", "divergence_free"):
        wanted = None if dim == 1 else dim
        if outputs not in (None, dim):
            raise ValueError(f"outputs of a {constraint} field must be dim={dim}, got {outputs}")
        return wanted if outputs is None else outputs
    return outputs
