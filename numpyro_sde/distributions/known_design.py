"""Regressors of a collapsed path that no parameter changes, computed once for all parameter values.

Under Euler's scheme with constant noise D and a known path, the weights see the data through

    G_ij = sum_k h_k phi_ki phi_kj'   and   sum_k phi_k' D^-1 (x_{k+1} - x_k - h_k f0(x_k)),

for a field whose functions phi depend on no hyperparameter (sines on a box). G is a constant of
the model: a gradient costs the cube of the number of weights, whatever the number of data. So is
the second sum where f0 has no parameters to be learned.
"""

from __future__ import annotations

import math
from functools import partial
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
    """A regression on the weights of a field, in sums over the data.

    Attributes:
        gram: `sum_k h_k phi_ki phi_kj'`, shape `(d, d, m, m)`.
        cross: `sum_k phi_ki r_kj`, shape `(d, d, m)`, of residuals r without the field.
        square: `sum_k r_ki r_kj / h_k`, shape `(d, d)`.
        log_steps: `sum_k log h_k`.
        count: the number of steps n.
    """

    gram: Float[Array, "d d m m"]
    cross: Float[Array, "d d m"]
    square: Float[Array, "d d"]
    log_steps: Any
    count: Any

    def regression(self, noise: Float[Array, "d d"]) -> tuple[Array, Array, Array]:
        """Gram matrix, `b` and log density at zero weights, for the noise D per unit of time."""
        d = noise.shape[0]
        if d == 1:
            inverse, log_noise = 1.0 / noise, jnp.log(noise[0, 0])
        else:
            inverse, log_noise = jnp.linalg.inv(noise), jnp.linalg.slogdet(noise)[1]
        gram = jnp.tensordot(inverse, self.gram, axes=2)
        b = jnp.tensordot(inverse, self.cross, axes=2)
        log_det = log_noise * self.count + d * self.log_steps
        constant = self.count * d * math.log(2.0 * math.pi)
        return gram, b, -0.5 * ((inverse * self.square).sum() + log_det + constant)


def _slope_and_drift(
    treedef: Any, place: int, leaves: list[Any], t: Any, start: Any
) -> tuple[Array, Array]:
    """Slope of the drift in the weights, `(n, d, m)`, and the drift without them, `(n, d)`.

    Args:
        treedef: the equation's structure.
        place: the place of the weights among its leaves.
        leaves: its leaves.
        t: times at the beginning of the steps, `(n,)`.
        start: states there.
    """
    weights = leaves[place]

    def drift(w: Array) -> Array:
        own = [w if i == place else leaf for i, leaf in enumerate(leaves)]
        one: SDE = jax.tree_util.tree_unflatten(treedef, own)
        return jax.vmap(one.ito_drift_at)(t, start).reshape(len(t), -1)

    zero = jnp.zeros(jnp.shape(weights), jnp.result_type(weights))
    slope = jax.jacfwd(drift)(zero)
    return slope.reshape(*slope.shape[:2], -1), drift(zero)


# Compiled once for equations of one form, whatever their parameters.
_compiled_slope_and_drift = jax.jit(_slope_and_drift, static_argnums=(0, 1))


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

    shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in leaves]
    jaxpr = jax.make_jaxpr(partial(_slope_and_drift, treedef, place[0]))(shapes, t, start).jaxpr
    unknown = [isinstance(leaf, traced) for leaf in leaves]
    changed = reachable(
        jaxpr,
        [
            v
            for i, (v, u) in enumerate(zip(jaxpr.invars, unknown, strict=False))
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
        found = _compiled_slope_and_drift(treedef, place[0], held, t, start)
        phi, drift = (np.asarray(a, float) for a in found)
    steps = np.tile(np.diff(np.asarray(law.times)), len(states))
    increments = np.diff(states, axis=1).reshape(len(t), -1)
    gram = np.einsum("k,kim,kjn->ijmn", steps, phi, phi, optimize=True)
    log_steps = np.log(steps).sum()
    xp: Any = np
    h: Any = steps[:, None]
    rest: Any = increments - h * drift
    if changed[1]:  # by parameters, so within the trace
        xp, h = jnp, jnp.asarray(h, real)
        rest = (
            jnp.asarray(increments, real)
            - h * (_slope_and_drift(treedef, place[0], leaves, t, start)[1])
        )
    cross = xp.einsum("kim,kj->ijm", phi if xp is np else jnp.asarray(phi, real), rest)
    square = xp.einsum("ki,kj->ij", rest, rest / h)
    sums = (gram, cross, square, log_steps, float(len(t)))
    return KnownDesign(*(jnp.asarray(a, real) for a in sums))
