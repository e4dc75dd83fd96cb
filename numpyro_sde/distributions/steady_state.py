"""The law of the state before a dose, after so many doses that one more changes nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.events import Doses
from numpyro_sde.filters.forced import (
    forced_transitions,
    varies_inside,
    why_not_linear,
)
from numpyro_sde.grid import TimeGrid, resolution
from numpyro_sde.linear.small import congruence, matmul, matvec
from numpyro_sde.sde import SDE
from numpyro_sde.statespace.model import StateSpaceModel

# Doublings of the number of cycles: a state that has not settled after 2^40 is not stable.
_DOUBLINGS = 40


def steady_state(
    sde: SDE, doses: Doses, interval: float, *, state_shape: tuple[int, ...] | None = None
) -> dist.Distribution:
    """Law of the state right before the first of a cycle of doses, in the steady state.

    What one cycle does is an affine map `x -> F x + c + N(0, Q)`; the law that it leaves as it is
    has mean `(I - F)^-1 c` and covariance `P = F P F' + Q`. Give it to `SDEPath(..., init=)` of a
    path that starts with the next dose (NONMEM: SS=1).

    Args:
        sde: a linear SDE that forgets its start.
        doses: doses of one cycle, from `nsde.doses`; of repeated ones those of the first cycle.
        interval: length of a cycle (NONMEM: II).
        state_shape: `()` or `(d,)`; only needed where the drift would take several.

    Returns:
        A normal distribution, multivariate for vector states.

    Raises:
        ValueError: an SDE that is not linear, depends on time or does not forget its start
            (traced parameters give NaN); an interval that is not positive; an infusion that
            outlasts its cycle.
        TypeError: events that are no doses.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=0.1)
        >>> law = nsde.steady_state(sde, nsde.doses(0.0, 10.0), interval=8.0, state_shape=())
        >>> round(float(law.mean), 3)  # 10 / (e^0.8 - 1)
        8.16
    """
    if not isinstance(doses, Doses):
        raise TypeError(f"doses must come from nsde.doses(...), got {type(doses).__name__}")
    if not (np.ndim(interval) == 0 and np.isfinite(interval) and interval > 0):
        raise ValueError(f"interval must be one positive number, got {interval!r}")
    if sde.inputs is not None:
        raise ValueError("steady_state: an SDE with inputs never repeats itself: start earlier")
    shape = _state_shape(sde) if state_shape is None else tuple(state_shape)
    cycle = _first_cycle(doses, float(interval))
    lead = np.shape(cycle.times)[:-1]
    ends = np.broadcast_to(np.array([0.0, interval]), (*lead, 2))
    grid = TimeGrid(ends, include=cycle.breakpoints)
    path = SDEPath(sde, grid, dist.Delta(jnp.zeros(shape), event_dim=len(shape)), events=[cycle])
    mean, cov = ObservedPath(path, path.batch_shape).map(_settle)
    if not isinstance(mean, jax.core.Tracer) and not np.all(np.isfinite(mean)):
        raise ValueError(
            "steady_state: the SDE does not forget its start (what multiplies x in drift has an "
            "eigenvalue that is not negative), so it has no steady state"
        )
    if shape == ():
        return dist.Normal(mean[..., 0], jnp.sqrt(cov[..., 0, 0]))
    return dist.MultivariateNormal(mean, cov)


def _first_cycle(doses: Doses, interval: float) -> Doses:
    """Doses of the first cycle, in time since its start."""
    tolerance = resolution(doses.times, interval)
    since = doses.times - np.nanmin(doses.times, axis=-1, keepdims=True)
    since = np.where(since < interval - tolerance, since, np.nan)
    long = doses.durations
    if long is not None and np.any(since + long > interval + tolerance):
        raise ValueError(
            f"steady_state: an infusion runs past the end of its cycle of {interval}: give its two "
            "parts as two doses"
        )
    amounts = jnp.where(np.isnan(since), 0.0, doses.amounts)
    rule: Any = doses.rule
    return Doses(since, amounts, rule, long)


def _state_shape(sde: SDE) -> tuple[int, ...]:
    fits = []
    for shape in [(), *((d,) for d in range(1, 13))]:
        try:
            sde.structure(shape)
        except (TypeError, ValueError, IndexError):
            continue
        fits.append(shape)
    if len(fits) == 1:
        return fits[0]
    what = f"fits states of shapes {fits[:3]}" if fits else "fits none of up to 12 components"
    raise ValueError(f"steady_state: the SDE {what}: say which by state_shape=")


def _settle(model: StateSpaceModel) -> tuple[Array, Array]:
    reason = why_not_linear(model)
    if not reason and varies_inside(model):
        reason = "drift or diffusion depends on t"
    if reason:
        raise ValueError(
            f"steady_state is for linear SDEs: {reason}. Let the path start several intervals "
            "earlier instead"
        )
    d = model.dim
    steps = forced_transitions(model, np.arange(model.num_times))
    eye, zero = jnp.eye(d, dtype=steps[0].dtype), jnp.zeros(d, steps[0].dtype)

    def after(carry: Any, step: Any) -> tuple[Any, None]:
        (F, c, Q), (G, b, R) = carry, step
        return (matmul(G, F), matvec(G, c) + b, congruence(G, Q) + R), None

    def twice(carry: Any, _: None) -> tuple[Any, None]:
        return after(carry, carry)

    cycle, _ = lax.scan(after, (eye, zero, 0.0 * eye), steps)
    (F, mean, cov), _ = lax.scan(twice, cycle, None, _DOUBLINGS)
    forgets = lax.stop_gradient(jnp.max(jnp.abs(F)) < 1e-3)
    return jnp.where(forgets, mean, jnp.nan), jnp.where(forgets, cov, jnp.nan)
