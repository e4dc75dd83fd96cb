"""A slow process driven by a fast one: the full coupled system.

Averaging: `dX = f(X, Y) dt + s(X, Y) dW`, `dY = (1/eps) g(X, Y) dt + (1/sqrt(eps)) b(X, Y) dV`,
with the slow coefficients of order one. Homogenisation: a force of size `1/eps` that averages to
zero acts on the slow variable, and the fast one runs at speed `1/eps^2`. Sources: Pavliotis and
Stuart (2008), Multiscale Methods: Averaging and Homogenization, chapters 10 and 11; the same
systems are those of Saha and Ganguly (2026), arXiv:2605.09718.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.grid import TimeGrid
from numpyro_sde.processes.arguments import count, positive
from numpyro_sde.schemes import AbstractScheme, LocalLinear
from numpyro_sde.sde import SDE, as_function

Scaling = Literal["averaging", "homogenization"]
_USER = "params"


class Layout(NamedTuple):
    """Where slow and fast coordinates stand in the state; None for a scalar."""

    slow_dim: int | None
    fast_dim: int | None
    scaling: Scaling

    def split(self, state: Array) -> tuple[Array, Array]:
        """Cut the last dimension into slow and fast coordinates."""
        slow = 1 if self.slow_dim is None else self.slow_dim
        size = 0 if jnp.ndim(state) == 0 else jnp.shape(state)[-1]
        rest = size - slow
        if rest < 1 or (self.fast_dim is not None and rest != self.fast_dim):
            fast = "at least 1" if self.fast_dim is None else str(self.fast_dim)
            raise ValueError(
                f"a state of SlowFastSDE must have {slow} slow and {fast} fast coordinates in "
                f"its last dimension, got shape {jnp.shape(state)}: see slow_dim and fast_dim"
            )
        x = state[..., 0] if self.slow_dim is None else state[..., :slow]
        scalar = self.fast_dim is None and rest == 1
        return x, state[..., slow] if scalar else state[..., slow:]

    def powers(self) -> tuple[float, float]:
        """Powers of epsilon that divide the fast drift and the fast diffusion."""
        return (1.0, 0.5) if self.scaling == "averaging" else (2.0, 1.0)


def _ignore_params(fn: Callable[..., Any], t: Any, x: Any, y: Any, *rest: Any) -> Any:
    return fn(t, x, y, None, *rest)


def _coefficient(fn: Any, role: str, given: bool) -> Callable[..., Any]:
    """Check a function of (t, x, y, p); without params one of (t, x, y) serves too."""
    if given:
        as_function(fn, role, "t, x, y", {"p": ("params", True)})
        return cast("Callable[..., Any]", fn)
    try:
        as_function(fn, role, "t, x, y", {"p": ("params", False)})
    except TypeError:
        as_function(fn, role, "t, x, y, p", {})
        return Partial(_ignore_params, fn)
    return cast("Callable[..., Any]", fn)


def call(fn: Callable[..., Any], t: Any, x: Any, y: Any, p: Any) -> Array:
    """A coefficient at one slow and one fast state; `p` is None where there are no params."""
    return jnp.asarray(fn(t, x, y) if p is None else fn(t, x, y, p))


def call_of_state(fn: Callable[..., Any], x: Any, p: Any) -> Array:
    """A scalar function of one state, a potential; `p` is None where there are no params."""
    value = jnp.asarray(fn(x) if p is None else fn(x, p))
    if value.shape != ():
        raise ValueError(f"a potential must return a scalar, got shape {value.shape}")
    return value


def _full_drift(layout: Layout, parts: dict[str, Any], t: Any, state: Any, p: Any) -> Array:
    x, y = layout.split(state)
    user, eps = p.get(_USER), p["epsilon"]
    power, _ = layout.powers()
    slow = call(parts["slow_drift"], t, x, y, user)
    fast = call(parts["fast_drift"], t, x, y, user) / eps**power
    if "slow_forcing" in parts:
        slow = slow + call(parts["slow_forcing"], t, x, y, user) / eps
    if "fast_forcing" in parts:
        fast = fast + call(parts["fast_forcing"], t, x, y, user) / eps
    for role, value, like in (("slow_drift", slow, x), ("fast_drift", fast, y)):
        if value.shape != like.shape:
            raise ValueError(f"{role} must return the shape {like.shape}, got {value.shape}")
    return jnp.concatenate([jnp.atleast_1d(slow), jnp.atleast_1d(fast)])


def as_columns(value: Array, like: Array) -> Array:
    """A diffusion of any allowed shape as a matrix `(d, m)`, scalars having one row."""
    if value.ndim > like.ndim:
        return value[None] if like.ndim == 0 else value
    return jnp.diag(jnp.atleast_1d(jnp.broadcast_to(value, like.shape)))


def _full_diffusion(layout: Layout, parts: dict[str, Any], t: Any, state: Any, p: Any) -> Array:
    x, y = layout.split(state)
    user = p.get(_USER)
    slow = call(parts["slow_diffusion"], t, x, y, user)
    fast = call(parts["fast_diffusion"], t, x, y, user) / p["epsilon"] ** layout.powers()[1]
    for role, value, like in (("slow_diffusion", slow, x), ("fast_diffusion", fast, y)):
        check_diffusion_shape(role, value.shape, like.shape)
    if slow.ndim <= x.ndim and fast.ndim <= y.ndim:
        own = [jnp.atleast_1d(jnp.broadcast_to(v, z.shape)) for v, z in ((slow, x), (fast, y))]
        return jnp.concatenate(own)
    slow, fast = as_columns(slow, x), as_columns(fast, y)
    zero = jnp.zeros((slow.shape[0], fast.shape[1]), slow.dtype)
    under = jnp.zeros((fast.shape[0], slow.shape[1]), slow.dtype)
    return jnp.block([[slow, zero], [under, fast]])


def square_of(values: Array, state_ndim: int) -> Array:
    """Squares of diffusions `(L, ...)`: variances where noise is diagonal, else matrices."""
    if values.ndim - 1 <= state_ndim:
        return values**2
    if state_ndim == 0:
        return jnp.sum(values**2, axis=-1)
    return jnp.einsum("lim,ljm->lij", values, values)


def slow_squares(functions: dict[str, Any], t: Any, x: Array, p: Any, y: Array) -> Array:
    """`s s'` at every node: scalars for a scalar slow state, else matrices."""
    slow = jax.vmap(lambda one: call(functions["slow_diffusion"], t, x, one, p))(y)
    square = square_of(slow, x.ndim)
    if x.ndim == 0 or square.ndim == 3:
        return square
    return jax.vmap(lambda v: jnp.diag(jnp.broadcast_to(v, x.shape)))(square)


def check_diffusion_shape(role: str, got: tuple[int, ...], state: tuple[int, ...]) -> None:
    """Raise a `ValueError` for a diffusion that is neither scalar, nor diagonal, nor a matrix."""
    if got in ((), state) or (got[:-1] == state and len(got) == len(state) + 1):
        return
    raise ValueError(
        f"{role} must return a scalar, the shape {state}, or {(*state, 'm')} for m Brownian "
        f"motions, got {got}"
    )


class SlowFastSDE(SDE):
    """A slow process coupled to a fast one, at a finite separation `epsilon` of their scales.

    The state is `(slow, fast)` joined along its last dimension, shape `(slow + fast,)`, with
    independent Brownian motions for the two. Functions are written without `epsilon`; the powers
    of it are put in here:

    * `scaling="averaging"`: `dX = slow_drift dt + slow_diffusion dW`,
      `dY = fast_drift / eps dt + fast_diffusion / sqrt(eps) dV`. `average` gives the limit.
    * `scaling="homogenization"`: `dX = (slow_drift + slow_forcing / eps) dt + slow_diffusion dW`,
      `dY = (fast_drift / eps^2 + fast_forcing / eps) dt + fast_diffusion / eps dV`, where
      `slow_forcing` has mean zero under the fast law. `homogenize` gives the limit.

    Its transition density is by default `LocalLinear()`, which stays stable where a step is
    long against `epsilon` (an Euler step is not, beyond two fast relaxation times). Stable is
    not accurate: a nonlinear dependence on the fast variable is averaged rightly only by steps
    that resolve it (`grid`), or by the limit itself. With `scheme=nsde.schemes.Euler()` on such
    a grid one step is several times cheaper.

    Args:
        slow_drift: `f(t, x, y, p)`, the shape of `x`. Without `params`, `f(t, x, y)`.
        slow_diffusion: `s(t, x, y, p)`, a scalar, the shape of `x`, or `(*x, m)`.
        fast_drift: `g(t, x, y, p)`, the shape of `y`.
        fast_diffusion: `b(t, x, y, p)`, a scalar, the shape of `y`, or `(*y, m)`.
        epsilon: separation of the scales, fast time over slow time; positive. May be batched.
        params: pytree of arrays, handed to all functions as `p`.
        event_dims: their event dimensions, as for `SDE`.
        slow_dim: number of slow coordinates; None for a scalar `x` of shape `()`.
        fast_dim: number of fast coordinates; None for a scalar `y` where the state leaves one
            coordinate for it, else a vector of all that it leaves.
        scaling: "averaging" or "homogenization".
        slow_forcing: the slow force of size `1/eps` (homogenisation).
        fast_forcing: the fast force of size `1/eps` (homogenisation).

    Raises:
        TypeError: coefficients that are no functions of the right arguments, or sizes that are
            no integers.
        ValueError: an `epsilon` that is not positive; forcings without homogenisation, or
            homogenisation without `slow_forcing`; coefficients whose shape does not fit.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> sde = nsde.SlowFastSDE(
        ...     slow_drift=lambda t, x, y, p: x * (1.0 - y**2),
        ...     slow_diffusion=lambda t, x, y, p: p["s"],
        ...     fast_drift=lambda t, x, y, p: x - y,
        ...     fast_diffusion=lambda t, x, y, p: jnp.sqrt(2.0 * p["v"]),
        ...     epsilon=0.1,
        ...     params={"s": 0.3, "v": 0.5},
        ... )
        >>> sde.drift_at(0.0, sde.join(1.0, 2.0)).tolist()
        [-3.0, -10.0]
    """

    layout: Layout = eqx.field(static=True)
    declared: Any = eqx.field(static=True)

    def __init__(
        self,
        slow_drift: Callable[..., Any],
        slow_diffusion: Callable[..., Any],
        fast_drift: Callable[..., Any],
        fast_diffusion: Callable[..., Any],
        epsilon: ArrayLike,
        params: Any = None,
        *,
        event_dims: Any = None,
        slow_dim: int | None = None,
        fast_dim: int | None = None,
        scaling: Scaling = "averaging",
        slow_forcing: Callable[..., Any] | None = None,
        fast_forcing: Callable[..., Any] | None = None,
    ) -> None:
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be 'averaging' or 'homogenization', got {scaling!r}")
        _check_forcing(scaling, slow_forcing, fast_forcing)
        if params is None and event_dims is not None:
            raise ValueError("event_dims was given without params: there is nothing to declare")
        given = params is not None
        drifts: dict[str, Any] = {"slow_drift": slow_drift, "fast_drift": fast_drift}
        drifts |= {"slow_forcing": slow_forcing, "fast_forcing": fast_forcing}
        diffusions: dict[str, Any] = {
            "slow_diffusion": slow_diffusion,
            "fast_diffusion": fast_diffusion,
        }
        drifts = {k: _coefficient(f, k, given) for k, f in drifts.items() if f is not None}
        diffusions = {k: _coefficient(f, k, given) for k, f in diffusions.items()}
        sizes = {"slow_dim": slow_dim, "fast_dim": fast_dim}
        dims = {k: None if d is None else count(k, d, 1) for k, d in sizes.items()}
        self.layout = Layout(dims["slow_dim"], dims["fast_dim"], scaling)
        self.declared = freeze(event_dims)
        own: dict[str, Any] = {"epsilon": positive("epsilon", epsilon)}
        super().__init__(
            Partial(_full_drift, self.layout, drifts),
            Partial(_full_diffusion, self.layout, diffusions),
            params=own | ({_USER: params} if given else {}),
            event_dims=None if event_dims is None else {_USER: event_dims},
        )

    def default_transition(self) -> AbstractScheme | None:
        return LocalLinear()

    @property
    def epsilon(self) -> Array:
        """Separation of the scales."""
        return self.params["epsilon"]

    @property
    def user_params(self) -> Any:
        """The parameters as they were given, without `epsilon`; None for none."""
        return self.params.get(_USER)

    @property
    def event_dims(self) -> Any:
        """The event dimensions as they were declared."""
        return thaw(self.declared)

    @property
    def coordinates(self) -> tuple[str, ...]:
        """Names of the coordinates of the state, in order.

        The last one stands for all fast coordinates where `fast_dim` is not given.
        """
        slow = _names("slow", self.layout.slow_dim)
        return (*slow, *_names("fast", self.layout.fast_dim))

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The user's functions, by the names of the arguments that they came as."""
        drift: Any = self.drift.function
        diffusion: Any = self.diffusion.function
        return {**drift.args[1], **diffusion.args[1]}

    @property
    def slow_shape(self) -> tuple[int, ...]:
        """Shape of one slow state."""
        return () if self.layout.slow_dim is None else (self.layout.slow_dim,)

    def slow(self, state: ArrayLike) -> Float[Array, "..."]:
        """Slow coordinates of states `(..., slow + fast)`: shape `(...)` or `(..., slow)`."""
        return self.layout.split(jnp.asarray(state))[0]

    def fast(self, state: ArrayLike) -> Float[Array, "..."]:
        """Fast coordinates of states `(..., slow + fast)`: shape `(...)` or `(..., fast)`."""
        return self.layout.split(jnp.asarray(state))[1]

    def join(self, x: ArrayLike, y: ArrayLike) -> Float[Array, "..."]:
        """One state from its slow and its fast part, shape `(slow + fast,)`."""
        return jnp.concatenate([jnp.atleast_1d(jnp.asarray(x)), jnp.atleast_1d(jnp.asarray(y))])

    def grid(self, times: Any, steps_per_scale: float = 5.0) -> TimeGrid:
        """Refine times so that steps resolve the fast scale.

        Args:
            times: strictly increasing times.
            steps_per_scale: steps for each `epsilon` (`epsilon^2` in homogenisation), the
                time in which a fast process of unit rate relaxes.

        Raises:
            ValueError: `steps_per_scale` that is not positive, or an `epsilon` that is traced.
        """
        if not steps_per_scale > 0:
            raise ValueError(f"steps_per_scale must be positive, got {steps_per_scale}")
        if isinstance(self.epsilon, jax.core.Tracer):
            raise ValueError(
                "a grid is made before tracing, but epsilon is traced: build it from a number"
            )
        scale = float(np.min(np.asarray(self.epsilon))) ** self.layout.powers()[0]
        # An epsilon rounded down to float32 must not cost one more step in each interval.
        return TimeGrid(times, (1.0 + 1e-6) * scale / steps_per_scale)

    def frozen_fast(self, x: ArrayLike, t: ArrayLike = 0.0) -> SDE:
        """The fast process in its own time, at a fixed slow state: `dY = g dt + b dV`.

        For unbatched parameters.
        """
        return SDE(
            Partial(_frozen, self.functions["fast_drift"], self.user_params, t, x),
            Partial(_frozen, self.functions["fast_diffusion"], self.user_params, t, x),
        )


def _frozen(fn: Callable[..., Any], p: Any, t: Any, x: Any, _: Any, y: Any) -> Array:
    return call(fn, t, x, y, p)


def _names(part: str, dim: int | None) -> tuple[str, ...]:
    return (part,) if dim is None else tuple(f"{part}[{i}]" for i in range(dim))


def _check_forcing(scaling: str, slow: Any, fast: Any) -> None:
    if scaling == "averaging" and not (slow is None and fast is None):
        raise ValueError(
            "slow_forcing and fast_forcing act at size 1/epsilon, which averaging does not have: "
            "give scaling='homogenization'"
        )
    if scaling == "homogenization" and slow is None:
        raise ValueError(
            "scaling='homogenization' needs slow_forcing, the slow force of size 1/epsilon; "
            "without one the limit is that of scaling='averaging'"
        )


def freeze(event_dims: Any) -> Any:
    """Declared event dimensions in hashable form."""
    if isinstance(event_dims, Mapping):
        return ("mapping", tuple((k, freeze(v)) for k, v in event_dims.items()))
    return event_dims


def thaw(frozen: Any) -> Any:
    """Undo `freeze`."""
    if isinstance(frozen, tuple):
        return {k: thaw(v) for k, v in frozen[1]}
    return frozen
