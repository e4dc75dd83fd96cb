"""First states of NUTS from the search that a guided path makes anyway.

`GuidedReparam` searches for the mode along its guided paths. Its one compiled gradient gives the
curvature there too: with the innovations near standard normal, a chain starts in the posterior and
in a metric that fits, and NumPyro's own search for a start has nothing left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from numpyro.handlers import seed, trace
from numpyro.infer.hmc import HMCState, momentum_generator
from numpyro.infer.hmc_util import IntegratorState, euclidean_kinetic_energy, warmup_adapter
from numpyro.infer.util import ParamInfo

from numpyro_sde.reparam.path import is_innovation
from numpyro_sde.reparam.planning import Found, collecting

# Standard deviations by which the energy of a start may exceed that of a normal posterior.
_MOST_EXCESS = 10.0


def search_start(model: Callable[..., Any], args: Any, kwargs: Any) -> Found | None:
    """What the guided paths of a model found; None where that is no start for all its sites."""
    shapes: dict[str, tuple[int, ...]] = {}

    def run() -> int:
        with trace() as sites, seed(rng_seed=0):
            model(*args, **kwargs)
        for name, site in sites.items():
            if site["type"] == "sample" and not site["is_observed"]:
                shapes[name] = np.shape(site["value"])
        return 0

    with collecting() as found:
        jax.eval_shape(run)
    if len(found) != 1 or set(found[0].mode) != set(shapes):
        return None
    return found[0]


def start_near_mode(found: Found, key: PRNGKeyArray) -> ParamInfo | None:
    """A draw of the normal approximation at the mode, or the mode where that is far off.

    Returns:
        Unconstrained values, minus their log density and its gradient; None where the density is
        not finite even at the mode.
    """
    best, slope = found.gradient(found.mode)
    if not (np.isfinite(best) and all(np.all(np.isfinite(g)) for g in slope.values())):
        return None
    rng = np.random.default_rng(np.ravel(jax.random.key_data(_typed(key))))
    z = draw_near_mode(found, rng.standard_normal)
    value, gradient = found.gradient(z)
    size = sum(np.size(z[name]) for name in z if is_innovation(name) or name in found.names)
    # Half a chi-squared variable: its mean and standard deviation.
    excess = (float(value) - float(best) - 0.5 * size) / math.sqrt(0.5 * size)
    finite = np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradient.values())
    if not finite or excess > _MOST_EXCESS:
        return ParamInfo(found.mode, best, slope)
    return ParamInfo(z, value, gradient)


def draw_near_mode(found: Found, normals: Callable[[tuple[int, ...]], Any]) -> dict[str, Any]:
    """The mode moved by the normal approximation there, and standard normal innovations."""
    z: dict[str, Any] = dict(found.mode)
    for name, value in found.mode.items():
        if is_innovation(name):
            z[name] = normals(np.shape(value)).astype(value.dtype)
    if found.covariance is not None:
        step = np.linalg.cholesky(found.covariance) @ normals((len(found.covariance),))
        ends = np.cumsum([0, *(found.mode[name].size for name in found.names)])
        for name, a, b in zip(found.names, ends[:-1], ends[1:], strict=True):
            value = found.mode[name]
            z[name] = (value + step[a:b].reshape(value.shape)).astype(value.dtype)
    return z


def _typed(key: PRNGKeyArray) -> PRNGKeyArray:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


class Adaptation(NamedTuple):
    """How a warm-up adapts; NumPyro's options, hashable."""

    num_warmup: int
    adapt_step_size: bool
    adapt_mass_matrix: bool
    dense_mass: tuple[tuple[str, ...], ...]
    target_accept_prob: float
    regularize_mass_matrix: bool

    def adapter(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """NumPyro's two functions, for the first state and for each step."""
        options = self._asdict()
        num_warmup = options.pop("num_warmup")
        options["dense_mass"] = list(self.dense_mass)
        return warmup_adapter(num_warmup, **options)


@partial(jax.jit, static_argnums=0)
def first_state(
    adaptation: Adaptation, start: ParamInfo, inverse_mass: Any, step_size: Any, key: Any
) -> HMCState:
    """The state of a chain that starts at given values; compiled once for a model."""
    key, warmup_key, momentum_key = jax.random.split(key, 3)
    begin, _ = adaptation.adapter()
    z, value, slope = start
    info = IntegratorState(z, None, value, slope)
    adapted = begin(info, warmup_key, step_size, inverse_mass_matrix=inverse_mass)
    r = momentum_generator(z, adapted.mass_matrix_sqrt, momentum_key)
    energy = value + euclidean_kinetic_energy(adapted.inverse_mass_matrix, r)
    none, zero = jnp.array(0, jnp.result_type(int)), jnp.zeros(())
    return HMCState(
        i=none,
        z=z,
        z_grad=slope,
        potential_energy=value,
        energy=energy,
        r=None,
        trajectory_length=None,
        num_steps=none,
        accept_prob=zero,
        mean_accept_prob=zero,
        diverging=jnp.array(False),
        adapt_state=adapted,
        rng_key=key,
    )
