"""Exact laws of fractional Brownian motion, fractional Gaussian noise and fractional OU.

Densities are exact: by Cholesky at any times; at equally spaced ones in O(N log N) for kind-1
fBM and its noise (`linear.toeplitz`, `noise.determinant`), in O(N^2) time and O(N) memory for
stationary fractional OU. Draws of fBM at equally spaced times are made by circulant embedding,
of stationary fractional OU one by one.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import vmap_over

from numpyro_sde.distributions.gaussian_series import (
    _HALF_LOG_2PI,
    GaussianSeries,
    check_parameter,
    normal_log_density,
    read_times,
    stationary_draw,
)
from numpyro_sde.linear.toeplitz import (
    toeplitz_draw,
    toeplitz_log_determinant,
    toeplitz_quadratic,
)
from numpyro_sde.noise.covariances import (
    fgn_autocovariance,
    fou_autocovariance,
    fou_zero_start_covariance,
    increment_covariance,
    increments_covariance,
    power,
    riemann_liouville_covariance,
    riemann_liouville_matrix,
)
from numpyro_sde.noise.determinant import fgn_log_determinant

# Longest series for which a dense factorisation is the faster way, and the most exact one.
_DENSE_UP_TO = 256
_HURST = constraints.open_interval(0.0, 1.0)


@jax.jit
def _fgn_log_density(x: Array, hurst: Array, scale: Array) -> Array:
    """Log density of fractional Gaussian noise of this marginal scale."""
    n = x.shape[0]
    column = fgn_autocovariance(n, hurst)
    z = x / scale
    if n <= _DENSE_UP_TO:
        lag = np.abs(np.arange(n)[:, None] - np.arange(n))
        core = normal_log_density(column[lag], z)
    else:
        core = -0.5 * (toeplitz_quadratic(column, z) + fgn_log_determinant(n, hurst))
        core = core - _HALF_LOG_2PI * n
    return core - n * jnp.log(scale)


@partial(jax.jit, static_argnums=1)
def _fgn_draw(key: PRNGKeyArray, length: int, hurst: Array) -> Array:
    return stationary_draw(key, lambda n: fgn_autocovariance(n, hurst), length)


def _in_range(hurst: Array) -> Array:
    """A Hurst index, NaN where it is none: a traced one cannot be refused."""
    return jnp.where((hurst > 0) & (hurst < 1), hurst, jnp.nan)


class FractionalGaussianNoise(GaussianSeries):
    """Increments of fractional Brownian motion over equal steps.

    A stationary Gaussian series of mean 0, standard deviation `scale dt^H` and autocovariance
    `scale^2 dt^2H (|k + 1|^2H - 2 |k|^2H + |k - 1|^2H) / 2` (Mandelbrot and Van Ness 1968).
    Above 256 points the density costs O(N log N), its gradient too, and holds for H between 0.01
    and 0.99 (NaN beyond); it is exact to 11 digits. Event shape `(length,)`.

    Args:
        length: number of points N.
        dt: step, in the user's unit of time.
        hurst: Hurst index H in (0, 1).
        scale: state units per time^H.

    Raises:
        ValueError: a length below 1, or known parameters outside their range.

    Example:
        >>> import jax, numpyro_sde as nsde
        >>> law = nsde.distributions.FractionalGaussianNoise(1000, 0.5, hurst=0.7, scale=2.0)
        >>> law.sample(jax.random.key(0)).shape
        (1000,)
    """

    arg_constraints: ClassVar = {
        "dt": constraints.positive,
        "hurst": _HURST,
        "scale": constraints.positive,
    }
    reparametrized_params: ClassVar = ["dt", "hurst", "scale"]
    pytree_aux_fields = ("length", "grid")

    def __init__(
        self,
        length: int,
        dt: ArrayLike = 1.0,
        hurst: ArrayLike = 0.5,
        scale: ArrayLike = 1.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
            raise ValueError(f"length must be an integer >= 1, got {length!r}")
        self.length = int(length)
        self.dt = check_parameter("dt", dt, 0.0)
        self.hurst = check_parameter("hurst", hurst, 0.0, 1.0)
        self.scale = check_parameter("scale", scale, 0.0)
        _, self.grid = read_times(np.arange(1.0, self.length + 1.0), least=None)
        self._set_shapes(self.length, validate_args)

    def _mean(self, *args: Any) -> Array:  # noqa: ARG002
        return jnp.zeros(self.length, jnp.result_type(float))

    def _cross(self, rows: Any, columns: Any, dt: Array, hurst: Array, scale: Array) -> Array:
        start = jnp.asarray(rows, dt.dtype)[:, None], jnp.asarray(columns, dt.dtype)[None]
        unit = increment_covariance(*((s, s + 1.0) for s in start), _in_range(hurst))
        return scale**2 * power(dt, 2 * hurst) * unit

    def _log_density(self, x: Array, dt: Array, hurst: Array, scale: Array) -> Array:
        hurst = _in_range(hurst)
        return _fgn_log_density(x, hurst, scale * power(dt, hurst))

    def _draw(self, key: PRNGKeyArray, dt: Array, hurst: Array, scale: Array) -> Array:
        return scale * power(dt, hurst) * _fgn_draw(key, self.length, _in_range(hurst))


class FractionalBrownianMotion(GaussianSeries):
    """Fractional Brownian motion at given times, started at 0 at time 0.

    Kind 1 (Mandelbrot and Van Ness 1968) has stationary increments, `Var B_t = scale^2 t^2H`;
    kind 2 (Riemann-Liouville) is `scale int_0^t (t - u)^(H - 1/2) dW_u / Gamma(H + 1/2)`, of
    variance `scale^2 t^2H / (2 H Gamma(H + 1/2)^2)`. A first time of 0 is allowed: the series is
    0 there, and its density is that of the rest. At times `dt, 2 dt, ...` (with or without 0),
    known before tracing, kind 1 has the density and the draws of `FractionalGaussianNoise`; else
    both cost a Cholesky factorisation, O(T^3). Event shape `(T,)`.

    Args:
        times: strictly increasing times from 0 on, shape `(*batch, T)`.
        hurst: Hurst index H in (0, 1).
        scale: state units per time^H.
        kind: 1 or 2.

    Raises:
        ValueError: times that are negative, not increasing or 0 alone; another kind; known
            parameters outside their range.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> law = nsde.distributions.FractionalBrownianMotion(np.arange(101) / 100, hurst=0.3)
        >>> bridge = law.sample_bridge(jax.random.key(0), at=[50, 100], values=[1.0, 0.0])
        >>> bridge.shape, bool(abs(bridge[50] - 1.0) < 1e-3)
        ((101,), True)
    """

    arg_constraints: ClassVar = {
        "times": constraints.ordered_vector,
        "hurst": _HURST,
        "scale": constraints.positive,
    }
    reparametrized_params: ClassVar = ["times", "hurst", "scale"]
    pytree_aux_fields = ("kind", "grid")
    _pinned = True

    def __init__(
        self,
        times: ArrayLike,
        hurst: ArrayLike = 0.5,
        scale: ArrayLike = 1.0,
        kind: int = 1,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if kind not in (1, 2):
            raise ValueError(f"kind must be 1 or 2, got {kind!r}")
        self.times, self.grid = read_times(times, least=0.0)
        self.hurst = check_parameter("hurst", hurst, 0.0, 1.0)
        self.scale = check_parameter("scale", scale, 0.0)
        self.kind = kind
        length = jnp.shape(self.times)[-1]
        if self.grid.starts_at_zero and length == 1:
            raise ValueError("times must hold a time after 0, where the process is known to be 0")
        self._set_shapes(length, validate_args)

    @property
    def _is_regular(self) -> bool:
        return self.kind == 1 and self.grid.from_origin

    def _after_zero(self, x: Array) -> Array:
        return x[1:] if self.grid.starts_at_zero else x

    def _mean(self, *args: Any) -> Array:  # noqa: ARG002
        return jnp.zeros(self.num_times, jnp.result_type(float))

    def _cross(self, rows: Any, columns: Any, times: Array, hurst: Array, scale: Array) -> Array:
        s, t = times[rows][:, None], times[columns][None]
        hurst = _in_range(hurst)
        if self.kind == 1:
            e = 2.0 * hurst
            return 0.5 * scale**2 * (power(s, e) + power(t, e) - power(jnp.abs(s - t), e))
        positive = (s > 0) & (t > 0)
        s, t = jnp.broadcast_arrays(jnp.where(s > 0, s, 1.0), jnp.where(t > 0, t, 1.0))
        return scale**2 * jnp.where(positive, riemann_liouville_covariance(s, t, hurst), 0.0)

    def _factor(self, times: Array, hurst: Array) -> Array:
        """Cholesky factor: of the increments for kind 1, of the values for kind 2."""
        if self.kind == 1:
            return jnp.linalg.cholesky(increments_covariance(times, hurst))
        return jnp.linalg.cholesky(riemann_liouville_matrix(times, hurst))

    def _log_density(self, x: Array, times: Array, hurst: Array, scale: Array) -> Array:
        x, times, hurst = self._after_zero(x), self._after_zero(times), _in_range(hurst)
        if self.kind == 2:
            cov = scale**2 * riemann_liouville_matrix(times, hurst)
            return normal_log_density(cov, x)
        increments = jnp.diff(x, prepend=0.0)
        if self._is_regular:
            step = jnp.asarray(self.grid.step, x.dtype)
            return _fgn_log_density(increments, hurst, scale * power(step, hurst))
        return normal_log_density(scale**2 * increments_covariance(times, hurst), increments)

    def _draw(self, key: PRNGKeyArray, times: Array, hurst: Array, scale: Array) -> Array:
        times, hurst = self._after_zero(times), _in_range(hurst)
        n = times.shape[0]
        if self._is_regular:
            step = jnp.asarray(self.grid.step, times.dtype)
            x = jnp.cumsum(power(step, hurst) * _fgn_draw(key, n, hurst))
        else:
            x = self._factor(times, hurst) @ jax.random.normal(key, (n,), times.dtype)
            x = jnp.cumsum(x) if self.kind == 1 else x
        x = scale * x
        return jnp.concatenate([jnp.zeros(1, x.dtype), x]) if self.grid.starts_at_zero else x


class FractionalOrnsteinUhlenbeck(GaussianSeries):
    """Fractional Ornstein-Uhlenbeck process at given times, driven by fBM of kind 1.

    `dX = rate (mean - X) dt + scale dB`. Stationary (Cheridito, Kawaguchi and Maejima 2003), or
    started at 0 at time 0: two different laws, also far from the start, since the noise
    remembers. The density of a stationary one at equally spaced times, known before tracing,
    costs O(T^2) time and O(T) memory, a draw too; else a Cholesky factorisation. Event shape
    `(T,)`.

    Args:
        times: strictly increasing times, shape `(*batch, T)`; from 0 on for `start="zero"`.
        hurst: Hurst index H in (0, 1).
        rate: mean reversion, 1/time.
        scale: state units per time^H.
        mean: level, state units.
        start: "stationary", or "zero" for `X_0 = 0`.

    Raises:
        ValueError: times that are not increasing, or negative or 0 alone for a zero start;
            another start; known parameters outside their range.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> law = nsde.distributions.FractionalOrnsteinUhlenbeck(
        ...     np.arange(50) / 10, hurst=0.3, rate=2.0, scale=0.5, mean=1.0)
        >>> law.sample(jax.random.key(0), (3,)).shape
        (3, 50)
    """

    arg_constraints: ClassVar = {
        "times": constraints.ordered_vector,
        "hurst": _HURST,
        "rate": constraints.positive,
        "scale": constraints.positive,
        "location": constraints.real,
    }
    reparametrized_params: ClassVar = ["times", "hurst", "rate", "scale", "location"]
    pytree_aux_fields = ("start", "grid")

    def __init__(
        self,
        times: ArrayLike,
        hurst: ArrayLike = 0.5,
        rate: ArrayLike = 1.0,
        scale: ArrayLike = 1.0,
        mean: ArrayLike = 0.0,
        *,
        start: str = "stationary",
        validate_args: bool | None = None,
    ) -> None:
        if start not in ("stationary", "zero"):
            raise ValueError(f"start must be 'stationary' or 'zero', got {start!r}")
        self.start = start
        self.times, self.grid = read_times(times, least=0.0 if start == "zero" else None)
        self.hurst = check_parameter("hurst", hurst, 0.0, 1.0)
        self.rate = check_parameter("rate", rate, 0.0)
        self.scale = check_parameter("scale", scale, 0.0)
        self.location = jnp.asarray(mean, jnp.result_type(float))
        length = jnp.shape(self.times)[-1]
        if self._pinned and self.grid.starts_at_zero and length == 1:
            raise ValueError("times must hold a time after 0, where the process is known to be 0")
        self._set_shapes(length, validate_args)

    @property
    def _pinned(self) -> bool:  # type: ignore[override]
        return self.start == "zero"

    def _mean(
        self, times: Array, hurst: Array, rate: Array, scale: Array, location: Array
    ) -> Array:
        del hurst, scale
        return location * (-jnp.expm1(-rate * times) if self._pinned else jnp.ones_like(times))

    def _cross(
        self,
        rows: Any,
        columns: Any,
        times: Array,
        hurst: Array,
        rate: Array,
        scale: Array,
        location: Array,
    ) -> Array:
        del location
        s, t, hurst = times[rows][:, None], times[columns][None], _in_range(hurst)
        if self._pinned:
            return fou_zero_start_covariance(s, t, hurst, rate, scale)
        return fou_autocovariance(jnp.abs(s - t), hurst, rate, scale)

    def _column(self, length: int, hurst: Array, rate: Array, scale: Array) -> Array:
        """Autocovariance at equally spaced times."""
        assert self.grid.step is not None
        lag = jnp.asarray(self.grid.step * np.arange(length), hurst.dtype)
        return fou_autocovariance(lag, _in_range(hurst), rate, scale)

    @property
    def _is_toeplitz(self) -> bool:
        return not self._pinned and self.grid.step is not None

    def _dense(self, *args: Any) -> Array:
        first = 1 if self._pinned and self.grid.starts_at_zero else 0
        index = np.arange(first, self.num_times)
        return self._cross(index, index, *args)

    def _log_density(self, x: Array, *args: Any) -> Array:
        x = x - self._mean(*args)
        if self._is_toeplitz and x.shape[0] > _DENSE_UP_TO:
            column = self._column(x.shape[0], *args[1:4])
            total = toeplitz_quadratic(column, x) + toeplitz_log_determinant(column)
            return -0.5 * total - _HALF_LOG_2PI * x.shape[0]
        cov = self._dense(*args)
        return normal_log_density(cov, x[x.shape[0] - cov.shape[0] :])

    def _draw(self, key: PRNGKeyArray, *args: Any) -> Array:
        mean = self._mean(*args)
        if self._is_toeplitz and self.num_times > _DENSE_UP_TO:
            # A circulant embedding need not exist: it does not for smooth, slow paths.
            normals = jax.random.normal(key, mean.shape, mean.dtype)
            return mean + toeplitz_draw(self._column(mean.size, *args[1:4]), normals)
        L = jnp.linalg.cholesky(self._dense(*args))
        x = L @ jax.random.normal(key, L.shape[:1], mean.dtype)
        return mean + jnp.concatenate([jnp.zeros(mean.size - x.size, x.dtype), x])


@vmap_over.register
def _vmap_over_noise(
    law: FractionalGaussianNoise, dt: Any = None, hurst: Any = None, scale: Any = None
) -> FractionalGaussianNoise:
    return _axes(law, dt=dt, hurst=hurst, scale=scale)


@vmap_over.register
def _vmap_over_motion(
    law: FractionalBrownianMotion, times: Any = None, hurst: Any = None, scale: Any = None
) -> FractionalBrownianMotion:
    return _axes(law, times=times, hurst=hurst, scale=scale)


@vmap_over.register
def _vmap_over_ou(
    law: FractionalOrnsteinUhlenbeck,
    times: Any = None,
    hurst: Any = None,
    rate: Any = None,
    scale: Any = None,
    mean: Any = None,
) -> FractionalOrnsteinUhlenbeck:
    return _axes(law, times=times, hurst=hurst, rate=rate, scale=scale, location=mean)


def _axes(law: Any, **axes: Any) -> Any:
    new = copy.copy(law)
    for name, axis in axes.items():
        setattr(new, name, axis)
    return new
