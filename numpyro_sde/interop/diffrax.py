"""The one place that imports Diffrax: its SDE solvers, one step at a time.

A Diffrax solver asks its terms for the Brownian increment of a step, with Levy areas where it
uses them. Here the increment is a function of given standard normals, so that a step is a map
of innovations that can be inverted by a reparametrisation, differentiated and mapped; the
caller's loop replaces `diffrax.diffeqsolve`.

Increments follow Foster, Lyons and Oberhauser (2020), SIAM Journal on Numerical Analysis 58:
over a step of length h, W ~ N(0, h), the space-time Levy area H ~ N(0, h/12) and the
space-time-time Levy area K ~ N(0, h/720), independent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal
from numpyro_sde.schemes.dependence import dependence

try:
    import diffrax
    import lineax
except ImportError as error:
    raise ImportError(
        "DiffraxSolver and the QUICSORT step need Diffrax: pip install 'numpyro-sde[diffrax]'"
    ) from error

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_AREA_SCALES = (1.0, math.sqrt(1.0 / 12.0), math.sqrt(1.0 / 720.0))


class FixedIncrement(diffrax.AbstractBrownianPath):
    """A Brownian path of which one step is known: whatever is asked, that step is the answer.

    Args:
        increment: W of the step, or an increment with Levy areas.
    """

    increment: Any
    levy_area: Any = eqx.field(static=True)

    @property
    def t0(self) -> Any:  # type: ignore[override]
        return -math.inf

    @property
    def t1(self) -> Any:  # type: ignore[override]
        return math.inf

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """Return the increment of the step, with its Levy areas if `use_levy`."""
        del t0, t1, left
        return self.increment if use_levy else self.increment.W


def one_step_solver(solver: Any) -> Any:
    """Check a solver, and set its inner loop to a plain scan.

    Diffrax runs the stages of a Runge-Kutta step in a checkpointed loop, which has no forward
    derivatives; a step has a handful of stages, so nothing is worth checkpointing.

    Raises:
        TypeError: not an SDE solver of Diffrax for `dX = f dt + L dW`.
    """
    if isinstance(solver, type):
        raise TypeError(f"solver must be an instance: call it, {solver.__name__}()")
    kinds = (diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver)
    if not isinstance(solver, kinds):
        raise TypeError(
            "solver must be a Diffrax Ito or Stratonovich solver such as diffrax.ShARK(), got "
            f"{type(solver).__name__}"
        )
    if isinstance(solver, diffrax.AbstractFosterLangevinSRK):
        raise TypeError(
            f"{type(solver).__name__} solves the underdamped Langevin equation only, in "
            "Diffrax's own terms; use diffrax.ShARK() for a process with additive noise"
        )
    if any(eqx.is_array(leaf) for leaf in jax.tree_util.tree_leaves(solver)):
        raise TypeError(f"solver {type(solver).__name__} must hold no arrays")
    if getattr(solver, "scan_kind", "") is None:
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, "lax", is_leaf=lambda x: x is None)
    return solver


def needs_additive_noise(solver: Any) -> bool:
    """Whether the solver is derived for a diffusion that does not use the state."""
    return isinstance(solver, diffrax.AbstractSRK) and solver.tableau.is_additive_noise()


def num_areas(solver: Any) -> int:
    """Number of independent normals for each Brownian motion: W, then H, then K."""
    area = getattr(solver, "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    if issubclass(area, diffrax.AbstractSpaceTimeTimeLevyArea):
        return 3
    return 2 if issubclass(area, diffrax.AbstractSpaceTimeLevyArea) else 1


def solver_step(
    solver: Any, sde: SDE, t: Array, h: Array, x: Array, normals: Float[Array, "areas *m"]
) -> Array:
    """One step of a Diffrax solver, driven by standard normals.

    Args:
        solver: a solver that `one_step_solver` returned.
        sde: an unbatched equation.
        t: time at the start.
        h: length of the step.
        x: state at the start.
        normals: standard normals behind W, H and K, as many as the solver uses.

    Returns:
        The next state.
    """

    def drift(s: Any, y: Any, args: Any) -> Array:
        del args
        return _drift_for(solver, sde, t + s, y).astype(x.dtype)

    def diffusion(s: Any, y: Any, args: Any) -> Any:
        del args
        value = _noise_at(sde, t + s, y).astype(x.dtype)
        return lineax.DiagonalLinearOperator(value) if value.ndim == y.ndim == 1 else value

    # The solver's clock starts at zero: the difference of two late times loses digits.
    start = jnp.zeros_like(h)
    path = _increment(h, normals)
    terms: Any = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
    state = solver.init(terms, start, h, x, None)
    return solver.step(terms, start, h, x, None, state, False)[0]


def _increment(h: Array, normals: Array) -> FixedIncrement:
    areas = [jnp.sqrt(h) * c * n for c, n in zip(_AREA_SCALES, normals, strict=False)]
    kinds: Any = (
        diffrax.BrownianIncrement,
        diffrax.SpaceTimeLevyArea,
        diffrax.SpaceTimeTimeLevyArea,
    )
    kind = kinds[len(areas) - 1]
    return FixedIncrement(kind(h, *areas), kind)


def _noise_at(sde: SDE, t: Array, x: Array) -> Array:
    """Diffusion as the solver sees it: one noise for a scalar, else as given."""
    value = sde.diffusion_at(t, x)
    return value if value.ndim > x.ndim > 0 else sde.noise_factor_at(t, x)


def _drift_for(solver: Any, sde: SDE, t: Array, x: Array) -> Array:
    """Drift of the same process in the calculus that the solver converges in.

    The correction `1/2 sum_j (L_j . grad) L_j` is that of the noise that the solver sees: a
    scalar state's several Brownian motions are one here, with another correction.
    """
    if isinstance(solver, diffrax.AbstractItoSolver):
        return sde.ito_drift_at(t, x)
    value = sde.diffusion_at(t, x)
    if sde.interpretation == "stratonovich" and not (x.ndim == 0 and value.ndim == 1):
        return sde.drift_at(t, x)
    drift = sde.ito_drift_at(t, x)
    if not dependence(sde, "diffusion", x.shape).state:
        return drift
    jacobian = jax.jacfwd(lambda s: _noise_at(sde, t, s))(x)
    noise = _noise_at(sde, t, x)
    if x.ndim == 0:
        return drift - 0.5 * noise * jacobian
    if noise.ndim == 1:
        return drift - 0.5 * noise * diagonal(jacobian)
    return drift - 0.5 * jnp.einsum("ijk,kj->i", jacobian, noise)


def langevin_step(
    grad: Any,
    h: float,
    friction: float,
    x: Float[Array, " D"],
    v: Float[Array, " D"],
    normals: Float[Array, "3 D"],
) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """One step of QUICSORT for `dx = v dt, dv = -friction v dt - grad(x) dt + noise`.

    Third order, two gradients a step (Foster, Lyons and Oberhauser 2021, "The shifted ODE method
    for underdamped Langevin MCMC", with the quadrature of Diffrax's `QUICSORT`). Its stationary
    law is near `exp(-f(x) - |v|^2 / 2)`, `grad` being the gradient of f.

    Args:
        grad: gradient of the potential.
        h: length of the step.
        friction: rate at which velocities forget.
        x: position.
        v: velocity.
        normals: standard normals behind W, H and K.
    """
    # Where series replace the coefficients, which cancel; Diffrax's own advice.
    solver = diffrax.QUICSORT(0.1 if x.dtype == jnp.float32 else 0.01)
    length = jnp.asarray(h, x.dtype)
    start = jnp.zeros_like(length)
    rate = jnp.full_like(x, friction)
    one = jnp.ones_like(x)
    drift = diffrax.UnderdampedLangevinDriftTerm(rate, one, lambda x, _: grad(x))
    noise = diffrax.UnderdampedLangevinDiffusionTerm(rate, one, _increment(length, normals))
    terms: Any = diffrax.MultiTerm(drift, noise)
    state = solver.init(terms, start, length, (x, v), None)
    (x, v), *_ = solver.step(terms, start, length, (x, v), None, state, False)
    return x, v
