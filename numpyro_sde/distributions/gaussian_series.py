"""What the fractional laws share: Gaussian series given by a covariance function.

A law says how one series is made (`_moments`, a route for `_log_density` and `_draw` where there
is a faster one than Cholesky's); batches, bridges and NumPyro's contract are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_sde.distributions.batching import align_new_axes, map_batch
from numpyro_sde.distributions.fixed_start import FixedStart
from numpyro_sde.grid import check_times
from numpyro_sde.linear.small import diagonal
from numpyro_sde.sde import broadcast_batch

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_STEP_TOLERANCE = 1e-9  # equal steps, relative to the last time


class Grid(NamedTuple):
    """What is known of the times before tracing.

    Attributes:
        step: the step where all are equal, else None.
        starts_at_zero: whether the first time is 0.
        from_origin: whether the times after 0 are `step, 2 step, ...`.
    """

    step: float | None = None
    starts_at_zero: bool = False
    from_origin: bool = False


def read_times(times: Any, *, least: float | None) -> tuple[Any, Grid]:
    """Checked times as an array, and what is known of them.

    Args:
        times: shape `(*batch, T)`; traced ones are taken as they are.
        least: the smallest time allowed, or None.

    Raises:
        ValueError: times that are not increasing or lie below `least`.
    """
    if isinstance(times, jax.core.Tracer):
        if times.ndim == 0:
            raise ValueError("times must have shape (*batch, T), got ()")
        return times, Grid()
    known = check_times(times)
    if least is not None and np.any(known[..., 0] < least):
        raise ValueError(f"times must be >= {least:g}, got {known[..., 0].min():g}")
    zero = bool(np.all(known[..., 0] == 0.0))
    if not zero and np.any(known[..., 0] == 0.0) and least is not None:
        raise ValueError("times must start at 0 in all series of a batch or in none")
    step, origin = None, False
    if known.ndim == 1 and known.size > 1:
        steps = np.diff(known)
        mean = (known[-1] - known[0]) / steps.size
        if np.all(np.abs(steps - mean) <= _STEP_TOLERANCE * np.abs(known).max()):
            step = float(mean)
            first = known[1] if zero else known[0]
            origin = bool(abs(first - mean) <= _STEP_TOLERANCE * np.abs(known).max())
    return known, Grid(step, zero, origin)


def check_parameter(name: str, value: Any, low: float, high: float = math.inf) -> Any:
    """A parameter as an array, refused where it is known and outside `(low, high)`.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    array = np.asarray(value, dtype=float)
    if not np.all((array > low) & (array < high)):
        wanted = "positive and finite" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return jnp.asarray(value, jnp.result_type(float))


@jax.jit
def normal_log_density(cov: Array, x: Array) -> Array:
    """Log density of `N(0, cov)` by Cholesky."""
    L = jnp.linalg.cholesky(cov)
    z = jax.scipy.linalg.solve_triangular(L, x, lower=True)
    log_det = jnp.sum(jnp.log(diagonal(L)))
    return -0.5 * (z @ z) - log_det - _HALF_LOG_2PI * x.shape[0]


def stationary_draw(key: PRNGKeyArray, covariance: Callable[[int], Array], length: int) -> Array:
    """Draw a stationary series by circulant embedding (Davies and Harte 1987).

    Args:
        key: random key.
        covariance: autocovariance at lags 0, ..., n - 1 for a given n.
        length: number of points.

    Returns:
        The series; NaN where the embedding is not positive semi-definite.
    """
    half = max(1 << (length - 1).bit_length(), 1)
    r = covariance(half + 1)
    spectrum = jnp.fft.rfft(jnp.concatenate([r, r[-2:0:-1]])).real
    floor = 1e3 * jnp.finfo(r.dtype).eps * jnp.max(spectrum)
    positive = spectrum > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, spectrum, 1.0)), 0.0)
    root = jnp.where(spectrum >= -floor, root, jnp.nan)
    white = jax.random.normal(key, (2 * half,), r.dtype)
    return jnp.fft.irfft(root * jnp.fft.rfft(white), 2 * half)[:length]


class GaussianSeries(dist.Distribution):
    """A Gaussian law of a series at T points; subclasses give its moments.

    A subclass declares `arg_constraints` for its array arguments, sets them, and calls
    `_set_shapes`. Its methods `_mean`, `_cross`, `_log_density` and `_draw` are written for one
    series and get the arguments in the order of `arg_constraints`.
    """

    pytree_aux_fields: tuple[str, ...] = ("lead_dims",)

    grid: Grid
    # Batch dimensions of each argument as constructed: a transformation that stacks laws adds
    # axes, and they must be told from the arguments' own.
    lead_dims: tuple[int, ...]

    def _set_shapes(self, length: int, validate_args: bool | None) -> None:
        shapes = {
            name: jnp.shape(getattr(self, name))[: jnp.ndim(getattr(self, name)) - dim]
            for name, dim in self._event_dims()
        }
        self.lead_dims = tuple(len(shape) for shape in shapes.values())
        super().__init__(broadcast_batch(shapes), (length,), validate_args=validate_args)

    def _event_dims(self) -> list[tuple[str, int]]:
        return [(name, c.event_dim) for name, c in self.arg_constraints.items()]

    def _map(
        self, fn: Callable[..., Any], lead: tuple[int, ...], arrays: Any = (), dims: Any = ()
    ) -> Any:
        """Map `fn(arguments, *arrays)` of one series over `lead`."""
        names = self._event_dims()
        values = [jnp.asarray(getattr(self, name), jnp.result_type(float)) for name, _ in names]

        def one(*flat: Any) -> Any:
            return fn(flat[: len(names)], *flat[len(names) :])

        return map_batch(one, lead, (*values, *arrays), (*(dim for _, dim in names), *dims))

    # --- one series ---------------------------------------------------------------------------

    def _mean(self, *args: Any) -> Array:
        """Mean, shape `(T,)`."""
        raise NotImplementedError

    def _cross(self, rows: Any, columns: Any, *args: Any) -> Array:
        """Covariance of the series at `rows` with that at `columns`, indices."""
        raise NotImplementedError

    def _log_density(self, x: Array, *args: Any) -> Array:
        raise NotImplementedError

    def _draw(self, key: PRNGKeyArray, *args: Any) -> Array:
        raise NotImplementedError

    # --- NumPyro's contract -------------------------------------------------------------------

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        if self.grid.starts_at_zero and self._pinned:
            zero = jnp.zeros(self.batch_shape)
            return FixedStart(zero, constraints.real, 0)
        return constraints.real_vector

    _pinned = False  # whether the series is 0 at time 0

    @property
    def num_times(self) -> int:
        """Number of points T."""
        return self.event_shape[0]

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        value = jnp.asarray(value, jnp.result_type(float))
        cut = value.ndim - 1
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"a series must have event shape {self.event_shape}, got an array of shape "
                f"{value.shape}"
            )
        lead = jnp.broadcast_shapes(value.shape[:cut], self.batch_shape)
        value = jnp.broadcast_to(value, lead + self.event_shape)

        def one(args: Any, x: Array) -> Array:
            if not (self.grid.starts_at_zero and self._pinned):
                return self._log_density(x, *args)
            starts = x[0] == 0.0
            return jnp.where(starts, self._log_density(x, *args), -jnp.inf)

        return self._map(one, lead, (value,), (1,))

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        lead = sample_shape + self.batch_shape
        keys = jax.random.split(key, lead)
        return self._map(
            lambda args, key: self._draw(key, *args), lead, (keys,), (keys.ndim - len(lead),)
        )

    @property
    def mean(self) -> Array:
        """Mean, shape `(*batch, T)`."""
        return self._map(lambda args: self._mean(*args), self.batch_shape)

    @property
    def variance(self) -> Array:
        """Variances, shape `(*batch, T)`."""
        index = np.arange(self.num_times)

        def one(args: Any) -> Array:
            return jax.vmap(lambda i: self._cross(i[None], i[None], *args)[0, 0])(index)

        return self._map(one, self.batch_shape)

    @property
    def covariance_matrix(self) -> Array:
        """Covariances, shape `(*batch, T, T)`."""
        index = np.arange(self.num_times)
        return self._map(lambda args: self._cross(index, index, *args), self.batch_shape)

    # --- bridges ------------------------------------------------------------------------------

    def _check_bridge(self, at: Any, values: Any) -> tuple[np.ndarray, Array]:
        index = np.asarray(at)
        if index.ndim != 1 or index.dtype.kind not in "iu" or index.size == 0:
            raise ValueError(f"at must be a list of indices into the series, got {at!r}")
        if len(set((index % self.num_times).tolist())) != index.size or (
            index.max() >= self.num_times or index.min() < -self.num_times
        ):
            raise ValueError(
                f"at must hold distinct indices of a series of {self.num_times} points, got {at!r}"
            )
        values = jnp.asarray(values, jnp.result_type(float))
        if values.shape[-1:] != index.shape:
            raise ValueError(
                f"values must have shape (*batch, {index.size}) for {index.size} indices in at, "
                f"got {values.shape}"
            )
        return index % self.num_times, values

    def _gain(self, index: np.ndarray, noise: Any, *args: Any) -> tuple[Array, Array]:
        """Covariance with the known points, and the Cholesky factor of what they show."""
        cross = self._cross(np.arange(self.num_times), index, *args)
        known = cross[index] + jnp.square(noise) * jnp.eye(index.size, dtype=cross.dtype)
        if self.grid.starts_at_zero and self._pinned:
            pinned = (index == 0) & (jnp.asarray(noise) == 0)  # known beforehand, says nothing
            known = known + jnp.diag(jnp.where(pinned, 1.0, 0.0))
        return cross, jnp.linalg.cholesky(known)

    def bridge_moments(
        self, at: ArrayLike, values: ArrayLike, noise: ArrayLike = 0.0
    ) -> tuple[Array, Array]:
        """Mean and covariance of the series given its values at some points.

        Args:
            at: indices of the K known points.
            values: what was seen there, shape `(*batch, K)`.
            noise: standard deviation of what was seen; 0 for the exact values.

        Returns:
            Mean `(*batch, T)` and covariance `(*batch, T, T)`.

        Raises:
            ValueError: indices outside the series or repeated, or values that do not fit.
        """
        index, values = self._check_bridge(at, values)
        lead = jnp.broadcast_shapes(self.batch_shape, values.shape[:-1], jnp.shape(noise))

        def one(args: Any, y: Array, noise: Array) -> tuple[Array, Array]:
            cross, L = self._gain(index, noise, *args)
            mean = self._mean(*args)
            half = jax.scipy.linalg.solve_triangular(L, cross.T, lower=True)
            white = jax.scipy.linalg.solve_triangular(L, y - mean[index], lower=True)
            full = self._cross(np.arange(self.num_times), np.arange(self.num_times), *args)
            return mean + half.T @ white, full - half.T @ half

        noise = jnp.asarray(noise, jnp.result_type(float))
        return self._map(one, lead, (values, noise), (1, 0))

    def sample_bridge(
        self,
        key: PRNGKeyArray,
        at: ArrayLike,
        values: ArrayLike,
        noise: ArrayLike = 0.0,
        sample_shape: tuple[int, ...] = (),
    ) -> Array:
        """Draw the series given its values at some points.

        A draw of the prior, corrected by what it misses at the known points (Matheron's rule;
        Journel and Huijbregts 1978): exact, and of the cost of a prior draw and K points.

        Args:
            key: random key.
            at: indices of the K known points.
            values: what was seen there, shape `(*batch, K)`.
            noise: standard deviation of what was seen; 0 for the exact values.
            sample_shape: leading shape of the draws.

        Returns:
            Series of shape `(*sample_shape, *batch, T)`.

        Raises:
            ValueError: indices outside the series or repeated, or values that do not fit.
        """
        index, values = self._check_bridge(at, values)
        noise = jnp.asarray(noise, jnp.result_type(float))
        batch = jnp.broadcast_shapes(self.batch_shape, values.shape[:-1], noise.shape)
        lead = tuple(sample_shape) + batch
        keys = jax.random.split(key, lead)

        def one(args: Any, y: Array, noise: Array, key: PRNGKeyArray) -> Array:
            key_path, key_noise = jax.random.split(key)
            x = self._draw(key_path, *args)
            seen = x[index] + noise * jax.random.normal(key_noise, index.shape, x.dtype)
            cross, L = self._gain(index, noise, *args)
            return x + cross @ jax.scipy.linalg.cho_solve((L, True), y - seen)

        dims = (1, 0, keys.ndim - len(lead))
        return self._map(one, lead, (values, noise, keys), dims)


@promote_batch_shape.register
def _promote_series(law: GaussianSeries) -> GaussianSeries:
    new, names = copy.copy(law), law._event_dims()
    values, dims = [getattr(law, name) for name, _ in names], [dim for _, dim in names]
    rank = len(law.batch_shape)
    values, new.lead_dims = align_new_axes(values, dims, law.lead_dims, rank)
    for (name, _), value in zip(names, values, strict=True):
        setattr(new, name, value)
    shapes = [jnp.shape(v)[:lead] for v, lead in zip(values, new.lead_dims, strict=True)]
    new._batch_shape = jnp.broadcast_shapes(law.batch_shape, *shapes)
    return new
