"""Regressors of a collapsed path that no parameter changes, computed once for all parameter values.

Under Euler's scheme with constant noise D and a known path, the weights see the data through

    G_ij = sum_k h_k phi_ki phi_kj'   and   sum_k phi_k' D^-1 (x_{k+1} - x_k - h_k f0(x_k)),

for a field whose functions phi depend on no hyperparameter (sines on a box). G is a constant of
the model: a gradient costs the cube of the number of weights, whatever the number of data.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.schemes import Euler
from numpyro_sde.schemes.dependence import dependence, reachable
from numpyro_sde.sde import SDE


class KnownDesign(NamedTuple):
    """A regression on the weights of a field whose regressors are known.

    Attributes:
        features: slope of the drift in the weights at each step, `(n, d, m)`.
        gram: `sum_k h_k phi_ki phi_kj'`, shape `(d, d, m, m)`.
        steps: h, shape `(n,)`.
        increments: `x_{k+1} - x_k`, shape `(n, d)`.
        drift: the drift without the field, `(n, d)`.
    """

    features: Float[Array, "n d m"]
    gram: Float[Array, "d d m m"]
    steps: Float[Array, " n"]
    increments: Float[Array, "n d"]
    drift: Float[Array, "n d"]

    def regression(self, noise: Float[Array, "d d"]) -> tuple[Array, Array, Array]:
        """Gram matrix, `b` and log density at zero weights, for the noise D per unit of time."""
        d = noise.shape[0]
        inverse = jnp.linalg.inv(noise)
        rest = self.increments - self.steps[:, None] * self.drift
        scaled = rest @ inverse
        gram = jnp.tensordot(inverse, self.gram, axes=2)
        b = jnp.einsum("kdm,kd->m", self.features, scaled)
        log_det = jnp.linalg.slogdet(noise)[1] * len(self.steps) + d * jnp.log(self.steps).sum()
        quadratic = ((scaled * rest).sum(-1) / self.steps).sum()
        log_density = -0.5 * (quadratic + log_det + rest.size * math.log(2.0 * math.pi))
        return gram, b, log_density


def known_design(law: SDEPath, weights: Array, x: Any) -> KnownDesign | None:
    """The regression on a field's weights, or None where parameters change the regressors.

    Args:
        law: the law of the path; all its series have one equation.
        weights: the field's weights among the parameters of `law.sde`, that very array.
        x: the path, shape `(*lead, T, *state)`.
    """
    sde, traced = law.sde, (jax.core.Tracer,)
    leaves, treedef = jax.tree_util.tree_flatten(sde)
    place = [i for i, leaf in enumerate(leaves) if leaf is weights]
    known = not isinstance(x, traced) and not isinstance(law.times, traced)
    if len(place) != 1 or not known or sde.batch_shape or not isinstance(law.scheme, Euler):
        return None
    uses = dependence(sde, "diffusion", law.state_shape)
    if uses.state or uses.time or sde.interpretation != "ito" or np.ndim(law.times) != 1:
        return None
    real = jnp.result_type(float)
    states = np.asarray(x, float).reshape(-1, law.num_times, math.prod(law.state_shape))
    # NumPy throughout: within a trace jnp would make tracers of them.
    t = np.tile(np.asarray(law.times)[:-1], len(states)).astype(real)
    start = states[:, :-1].reshape(-1, *law.state_shape).astype(real)

    def slope_and_drift(leaves: list[Any]) -> tuple[Array, Array]:
        def drift(w: Array) -> Array:
            own = [w if i == place[0] else leaf for i, leaf in enumerate(leaves)]
            one: SDE = jax.tree_util.tree_unflatten(treedef, own)
            return jax.vmap(one.ito_drift_at)(t, start).reshape(len(t), -1)

        zero = jnp.zeros(weights.shape, weights.dtype)
        slope = jax.jacfwd(drift)(zero)
        return slope.reshape(*slope.shape[:2], -1), drift(zero)

    shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in leaves]
    jaxpr = jax.make_jaxpr(slope_and_drift)(shapes).jaxpr
    unknown = [isinstance(leaf, traced) for leaf in leaves]
    changed = reachable(
        jaxpr,
        [
            v
            for i, (v, u) in enumerate(zip(jaxpr.invars, unknown, strict=True))
            if u and i != place[0]
        ],
    )
    if changed[0]:
        return None
    with jax.ensure_compile_time_eval():
        held = [
            np.zeros(jnp.shape(leaf), jnp.result_type(leaf)) if isinstance(leaf, traced) else leaf
            for leaf in leaves
        ]
        features, drift = jax.jit(slope_and_drift)(held)
        phi, drift = np.asarray(features), np.asarray(drift)
    steps = np.tile(np.diff(np.asarray(law.times)), len(states))
    increments = np.diff(states, axis=1).reshape(len(t), -1)
    wide = phi.astype(float)
    gram = np.einsum("k,kim,kjn->ijmn", steps, wide, wide, optimize=True)
    if changed[1]:
        drift = slope_and_drift(leaves)[1]
    return KnownDesign(*(jnp.asarray(a, real) for a in (phi, gram, steps, increments, drift)))
