"""Fractional Brownian motion as a sum of Ornstein-Uhlenbeck processes.

`B(t) = a . (U(t) - U(0)) + int_0^t b . U ds + c W_0(t)` with `dU_j = -rate_j U_j ds + (G dW)_j`:
a linear-Gaussian Markov process of a few states, so an SDE that it drives is one of more states.

"law" fit: independent drivers, `U_j` stationary of variance 1. The spectral density of the sampled
increments is linear in the squared coefficients, and they are found by linear least squares
against that of fractional Gaussian noise, in relative error. For H < 1/2 the terms are
`a_j (U_j(t) - U_j(0))`, high-pass filtered white noise; for H > 1/2 they are `int b_j U_j`,
low-pass, and a random slope `b_0 xi` matches the variance at the horizon. A white term `c W_0`
is in both, so both meet at H = 1/2, where it alone is left, and the coefficients stay positive.

"strong" fit: one driver for all, the coefficients optimal in `L2` on [0, horizon] for the fBM that
the same W drives: Daems, Opper, Crevecoeur and Birdal (2024), "Variational Inference for SDEs
Driven by Fractional Noise", with the variance of kind 1 normalised to 1 at time 1 and the nodes
scaled by the horizon; nodes for small H by Bayer and Breneis (2023), "Markovian approximations of
stochastic Volterra equations with the fractional kernel". See also Harms and Stefanovits (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.linear.small import diagonal
from numpyro_sde.noise.brownian import AbstractNoise
from numpyro_sde.noise.covariances import excess_of_exponential, fgn_spectral_density, power
from numpyro_sde.noise.strong_fit import strong_nodes, strong_weights

# By number of terms: first node (in 1 / horizon), last node (in 1 / step), lowest frequency fitted
# (in 1 / number of steps).
_TERMS = (5, 8, 12, 16)
_FIRST_NODE, _LAST_NODE = (0.5, 0.3, 0.1, 0.02), (3.0, 5.0, 5.0, 5.0)
_LOWEST = (0.3, 0.1, 0.05, 0.01)
_PANELS, _PANEL_NODES = 39, 8
_ROUNDS = 2  # of least squares, the second without the terms that came out negative
_SOLVES = (1, 3)  # of the normal equations in float64 and in float32
_SMALL = 0.5


class OUBank(NamedTuple):
    """The processes whose sum is the noise; see the module's opening.

    Attributes:
        rates: shape `(n,)`, 1/time; 0 for a constant.
        drivers: G, shape `(n, w)`.
        difference: a, shape `(*batch, n)`.
        integral: b, shape `(*batch, n)`.
        white: c, shape `(*batch,)`.
        start: covariance of U(0), shape `(n, n)`.

    Example:
        >>> from numpyro_sde.noise import MarkovFBM
        >>> bank = MarkovFBM(0.3).bank(horizon=1.0, step=0.01)
        >>> bank.rates.shape, bool((bank.difference[:-1] > 0).all())
        ((9,), True)
    """

    rates: Float[Array, " n"]
    drivers: Float[Array, "n w"]
    difference: Float[Array, "*batch n"]
    integral: Float[Array, "*batch n"]
    white: Float[Array, "*batch"]
    start: Float[Array, "n n"]

    def steps(self, dt: Float[Array, " s"]) -> BankSteps:
        """Exact law of the noise's increment and the bank over steps of given lengths."""
        return _steps(self, dt)


class BankSteps(NamedTuple):
    """`dB = loading . U + e`, `U' = decay U + f`, `Var e`, `Cov(f, e)`, `Cov f` of each step.

    Attributes:
        decay: shape `(s, n)`.
        loading: shape `(s, n)`.
        variance: shape `(s,)`.
        gain: shape `(s, n)`.
        noise: shape `(s, n, n)`.
    """

    decay: Float[Array, "s n"]
    loading: Float[Array, "s n"]
    variance: Float[Array, " s"]
    gain: Float[Array, "s n"]
    noise: Float[Array, "s n n"]


@jax.jit
def _steps(bank: OUBank, dt: Float[Array, " s"]) -> BankSteps:
    x = bank.rates[None] * dt[:, None]
    kept = jnp.exp(-x)
    passed = dt[:, None] * _phi1(-x)  # int_0^dt exp(-rate u) du
    noise = bank.drivers @ bank.drivers.T
    sums = (bank.rates[:, None] + bank.rates[None])[None] * dt[:, None, None]
    Q = noise[None] * dt[:, None, None] * _phi1(-sums)
    own = diagonal(noise)[None]
    # Of int U with itself and with U, without U(0); only for independent drivers.
    with_end = 0.5 * own * passed**2
    alone = own * dt[:, None] ** 3 * _third(x)
    a, b = bank.difference, bank.integral
    a, b = jnp.broadcast_to(a, x.shape), jnp.broadcast_to(b, x.shape)
    gain = jnp.einsum("sij,sj->si", Q, a) + with_end * b
    variance = (a * (gain + with_end * b)).sum(-1) + (b * b * alone).sum(-1)
    return BankSteps(
        decay=kept,
        loading=a * jnp.expm1(-x) + b * passed,
        variance=variance + bank.white**2 * dt,
        gain=gain,
        noise=Q,
    )


def _phi1(z: Array) -> Array:
    """`(e^z - 1) / z`, with its derivative at zero."""
    near = jnp.abs(z) < 1e-5
    safe = jnp.where(near, 1.0, z)
    return jnp.where(near, 1.0 + 0.5 * z, jnp.expm1(safe) / safe)


def _third(x: Array) -> Array:
    """`(x - 2 (1 - e^-x) + (1 - e^-2x) / 2) / x^3`, which is 1/3 at zero."""
    near = x < _SMALL
    s, f = jnp.where(near, x, 0.0), jnp.where(near, 1.0, x)
    # Coefficients of x^k: (-1)^k (2^(k + 2) - 2) / (k + 3)!.
    k = np.arange(16)
    terms = (-1.0) ** k * (2.0 ** (k + 2) - 2.0) / np.cumprod(np.arange(1, 20.0))[k + 2]
    series = jnp.zeros_like(x)
    for c in terms[::-1]:
        series = series * s + c
    return jnp.where(near, series, (f + 2.0 * jnp.expm1(-f) - 0.5 * jnp.expm1(-2.0 * f)) / f**3)


class LawFit(NamedTuple):
    """Squared coefficients of the law fit, in units of the step.

    Attributes:
        rates: nodes times the step, shape `(K,)`.
        weights: `d_j`: stationary variances `d_j / 2` of the terms `U_j` for H < 1/2,
            `d_j rate_j^2` for H > 1/2; shape `(K,)`.
        white: variance of the white term over one step.
        slope: variance of the random slope.
    """

    rates: Float[Array, " K"]
    weights: Float[Array, " K"]
    white: Float[Array, ""]
    slope: Float[Array, ""]


@partial(jax.jit, static_argnames=("num_terms", "with_white"))
def law_fit(
    hurst: ArrayLike,
    num_steps: ArrayLike,
    num_terms: int,
    *,
    rough: ArrayLike,
    with_white: bool = True,
) -> LawFit:
    """Fit the spectral density of sampled increments to that of fractional Gaussian noise.

    Args:
        hurst: Hurst index.
        num_steps: horizon over step.
        num_terms: number K of processes.
        rough: the form for H < 1/2, else that for H > 1/2.
        with_white: whether there is a white term.

    Example:
        >>> fit = law_fit(0.7, 1000.0, 8, rough=False)
        >>> fit.weights.shape, bool((fit.weights > 0).all())
        ((8,), True)
    """
    first, last, low = (
        np.exp(np.interp(num_terms, _TERMS, np.log(table)))
        for table in (_FIRST_NODE, _LAST_NODE, _LOWEST)
    )
    n = jnp.asarray(num_steps, jnp.result_type(float))
    share = np.linspace(0.0, 1.0, num_terms) if num_terms > 1 else np.array([1.0])
    rates = jnp.exp(jnp.log(first / n) * (1.0 - share) + np.log(last) * share)
    points, mass = np.polynomial.legendre.leggauss(_PANEL_NODES)
    start = jnp.log(low / n)
    width = (np.log(np.pi) - start) / _PANELS
    place = (np.arange(_PANELS)[:, None] + (points + 1.0) / 2.0).ravel()
    frequency = jnp.exp(start + width * place)
    mass = np.tile(mass / 2.0, _PANELS) * width * frequency
    rates_row = rates[None]
    q, down = jnp.exp(-rates_row), -jnp.expm1(-rates_row)
    half = 2.0 * jnp.sin(0.5 * frequency[:, None]) ** 2  # 1 - cos
    denominator = down**2 + 2.0 * q * half
    grown = rates_row**2 * excess_of_exponential(rates_row)  # rate - 1 + q
    basis = jnp.where(
        rough,
        down * (1.0 + q) * half / denominator / (2.0 * np.pi),
        (grown + down**2 * (down - half) / denominator) / np.pi,
    )
    white = jnp.full_like(frequency, 1.0 / (2.0 * np.pi))
    columns = [basis, white[:, None]] if with_white else [basis]
    d = _nonnegative_least_squares(
        jnp.concatenate(columns, axis=1) / fgn_spectral_density(frequency, hurst)[:, None],
        mass,
        clipped=with_white,
    )
    level = d[num_terms] if len(columns) > 1 else jnp.zeros_like(d[0])
    d = d[:num_terms]
    x = rates * n
    reached = 2.0 * (d * x * x * excess_of_exponential(x)).sum() + level * n
    missing = jnp.maximum(power(n, 2.0 * jnp.asarray(hurst)) - reached, 0.0)
    return LawFit(rates, d, level, jnp.where(rough, 0.0, missing / n**2))


def _nonnegative_least_squares(A: Array, mass: Array, *, clipped: bool) -> Array:
    """Minimise `sum mass (A d - 1)^2`; terms that come out negative are left out.

    The normal equations of a scaled matrix; in float32 corrected from the residual of the fit.
    """
    size = jnp.sqrt((mass[:, None] * A * A).sum(0))
    A = A / size[None]
    weighted = (mass[:, None] * A).T
    gram = weighted @ A
    kept = jnp.ones(A.shape[1], bool)
    d = jnp.zeros(A.shape[1], A.dtype)
    for _ in range(_ROUNDS if clipped else 1):
        both = kept[:, None] & kept[None]
        factor = jnp.linalg.cholesky(jnp.where(both, gram, jnp.eye(A.shape[1], dtype=A.dtype)))
        d = jnp.zeros_like(d)
        for _ in range(_SOLVES[A.dtype == jnp.float32]):
            rest = jnp.where(kept, weighted @ (1.0 - A @ d), 0.0)
            d = d + jax.scipy.linalg.cho_solve((factor, True), rest)
        kept = kept & (d > 0)
    return (jnp.where(kept, d, 0.0) if clipped else d) / size


def _root(x: Array) -> Array:
    """Square root, 0 with derivative 0 where x is not positive."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


class MarkovFBM(AbstractNoise):
    """Fractional Brownian motion approximated by Ornstein-Uhlenbeck processes.

    A driving noise: `SDE(drift, diffusion, noise=MarkovFBM(hurst))`. The user's path is the state;
    the processes are inside and are integrated out. Horizon and smallest step are read from the
    path's times: the law is accurate between these two scales.

    - `fit="law"` (kind 1): independent drivers, the law of the increments fitted. On 1,000 equal
      steps its Kullback-Leibler divergence from the exact law is below 1e-3 nats with 8 terms,
      below 1e-4 with 12, for all H; one more term for each factor of 5 in the number of steps.
    - `fit="strong"` (kinds 1 and 2): one Brownian driver, approximating the path of the fBM
      that this driver makes. Needed for kind 2 and where the driver itself matters; as a law it
      is far less accurate, and not for float32 with H > 1/2 (its weights cancel).

    A diffusion that depends on the state is read in the sense of Stratonovich (write
    `interpretation="stratonovich"`): for H < 1/2 no Ito integral exists, for H > 1/2 the two agree.

    Args:
        hurst: Hurst index H in (0, 1), shape `(*batch,)`; or a function of time: the increment at
            time t then has the coefficients of `H(t)`, `dB = sum a_j(H(t)) dU_j`, so that all
            indices share their drivers (multifractional noise by its increments, not
            `B_H(t)(t)`, which would gain a term `H'(t) dB_H / dH`).
        num_terms: number K of processes.
        kind: 1 (stationary increments) or 2 (Riemann-Liouville, starts without a past; variance
            `t^2H / (2 H Gamma(H + 1/2)^2)`).
        fit: "law" or "strong".

    Raises:
        ValueError: a Hurst index outside (0, 1), too few terms, or kind 2 with the law fit.
        TypeError: a count that is no integer.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> noise = nsde.noise.MarkovFBM(0.3, num_terms=8)
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5, noise=noise)
        >>> path = nsde.SDEPath(sde, np.arange(101) / 100, init=0.0)
        >>> path.sample(jax.random.key(0)).shape
        (101,)
    """

    hurst: Any
    num_terms: int = eqx.field(static=True)
    kind: int = eqx.field(static=True)
    fit: str = eqx.field(static=True)

    def __init__(
        self,
        hurst: ArrayLike | Callable[[Any], Any],
        num_terms: int = 8,
        kind: int = 1,
        fit: str = "law",
    ) -> None:
        if kind not in (1, 2):
            raise ValueError(f"kind must be 1 or 2, got {kind!r}")
        if fit not in ("law", "strong"):
            raise ValueError(f"fit must be 'law' or 'strong', got {fit!r}")
        if kind == 2 and fit == "law":
            raise ValueError(
                "fit='law' is for kind=1, whose increments are stationary; kind=2 needs "
                "fit='strong'"
            )
        if isinstance(num_terms, bool) or not isinstance(num_terms, int | np.integer):
            raise TypeError(f"num_terms must be an integer, got {type(num_terms).__name__}")
        if num_terms < 2:
            raise ValueError(f"num_terms must be at least 2, got {num_terms}")
        if callable(hurst) and not isinstance(hurst, jax.Array | np.ndarray):
            if fit == "strong":
                raise ValueError("hurst as a function of time needs fit='law'")
            self.hurst = hurst if isinstance(hurst, eqx.Module) else jax.tree_util.Partial(hurst)
        else:
            if isinstance(hurst, jax.core.Tracer):
                self.hurst = jnp.asarray(hurst, jnp.result_type(float))
            else:
                known = np.asarray(hurst, dtype=float)
                if not np.all((known > 0) & (known < 1)):
                    raise ValueError(f"hurst must be between 0 and 1, got {hurst}")
                # A known index stays one in a model that is being traced, or an argument.
                self.hurst = known.astype(jnp.result_type(float))
        self.num_terms, self.kind, self.fit = int(num_terms), kind, fit

    @property
    def varies(self) -> bool:
        """Whether the Hurst index is a function of time."""
        return callable(self.hurst) and not isinstance(self.hurst, jax.Array | np.ndarray)

    def leaf_event_dims(self) -> list[int]:
        leaves = jax.tree_util.tree_leaves(self.hurst)
        return [jnp.ndim(leaf) if self.varies else 0 for leaf in leaves]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return () if self.varies else tuple(jnp.shape(self.hurst))

    def bank(self, horizon: ArrayLike, step: ArrayLike, hurst: ArrayLike | None = None) -> OUBank:
        """The processes for a horizon and a smallest step, in the user's unit of time.

        Args:
            horizon: length of the path.
            step: its smallest step.
            hurst: the index to use instead of the noise's own.
        """
        given = self.hurst if hurst is None else hurst, horizon, step
        if any(isinstance(value, jax.core.Tracer) for value in given):
            return self._fitted(*given)
        # A known index: the fit is done once, not in every evaluation of a density.
        with jax.ensure_compile_time_eval():
            return self._fitted(*given)

    def _fitted(self, hurst: ArrayLike, horizon: ArrayLike, step: ArrayLike) -> OUBank:
        h, horizon, step = (
            jnp.asarray(value, jnp.result_type(float)) for value in (hurst, horizon, step)
        )
        # A traced index outside (0, 1) cannot be refused.
        h = jnp.where((h > 0) & (h < 1), h, jnp.nan)
        if self.fit == "strong":
            return _strong_bank(h, horizon, self.num_terms, self.kind)
        return _law_bank(h, horizon, step, self.num_terms)

    def on_grid(self, times: Any, dt: Any) -> tuple[OUBank, BankSteps]:
        """The bank for a path's times, and its law over each step.

        With equal steps, known before tracing, and a constant Hurst index the law of one step
        stands for all: leading axis 1.

        Args:
            times: shape `(T,)`.
            dt: shape `(T - 1,)`.
        """
        xp: Any = np if isinstance(dt, np.ndarray) else jnp
        horizon, step = dt.sum(), dt.min()
        if self.varies:
            at = jnp.asarray(times)[:-1]
            banks = jax.vmap(lambda t: self.bank(horizon, step, self.hurst(t)))(at)
            bank = banks._replace(
                rates=banks.rates[0], drivers=banks.drivers[0], start=banks.start[0]
            )
        else:
            bank = self.bank(horizon, step)
        lengths = xp.asarray(dt)
        if not self.varies and has_equal_steps(dt):
            lengths = lengths.mean(keepdims=True)
        return bank, bank.steps(jnp.asarray(lengths, bank.rates.dtype))


@partial(jax.jit, static_argnums=3)
def _law_bank(h: Array, horizon: Array, step: Array, num_terms: int) -> OUBank:
    num_steps = horizon / step
    rough = h < 0.5
    fit = law_fit(h, num_steps, num_terms, rough=rough)
    unit = power(step, h)
    rates = jnp.append(fit.rates / step, 0.0)
    weights = _root(fit.weights)
    a = jnp.append(math.sqrt(0.5) * weights, 0.0) * unit
    b = jnp.append(weights * fit.rates, _root(fit.slope)) * unit / step
    white = _root(fit.white) * unit / jnp.sqrt(step)
    return OUBank(
        rates=rates,
        drivers=jnp.diag(jnp.sqrt(2.0 * rates)),
        difference=jnp.where(rough, a, 0.0),
        integral=jnp.where(rough, 0.0, b),
        white=white,
        start=jnp.eye(rates.shape[0], dtype=h.dtype),
    )


@partial(jax.jit, static_argnums=(2, 3))
def _strong_bank(h: Array, horizon: Array, num_terms: int, kind: int) -> OUBank:
    rates = strong_nodes(h, num_terms, kind)
    weights = strong_weights(rates, h, 1.0, kind)
    if kind == 1:  # unit variance at time 1
        log_variance = -gammaln(2.0 * h + 1.0) - jnp.log(jnp.sin(jnp.pi * h))
        weights = weights * jnp.exp(-0.5 * log_variance)
    # From horizon 1: rates scale by 1 / horizon, B by horizon^H, W by horizon^(1/2).
    weights = weights * power(horizon, h - 0.5)
    rates = rates / horizon
    start = 1.0 / (rates[:, None] + rates[None]) if kind == 1 else jnp.zeros((rates.size,) * 2)
    return OUBank(
        rates=rates,
        drivers=jnp.ones((rates.size, 1), h.dtype),
        difference=weights,
        integral=jnp.zeros_like(weights),
        white=jnp.zeros_like(h),
        start=start,
    )


def has_equal_steps(dt: Any) -> bool:
    """Whether the steps are known before tracing, and equal."""
    return isinstance(dt, np.ndarray) and bool(np.ptp(dt) <= 1e-9 * dt.sum())
