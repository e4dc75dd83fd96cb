"""Simulation by any Diffrax SDE solver, as a map of standard normal innovations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.dependence import require_additive
from numpyro_sde.schemes.generator import as_point

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class DiffraxSolver(AbstractScheme):
    """Simulate with a Diffrax SDE solver; no density.

    For whitened paths (`reparam.InnovationReparam`) and prediction. The solver takes `substeps`
    equal steps for each step of the path. Innovations of one step are the concatenation over
    its substeps of the standard normals behind the Brownian increment W, and, for solvers that
    use them, the space-time Levy area H ~ N(0, h/12) and the space-time-time Levy area
    K ~ N(0, h/720), independent of one another (Foster, Lyons and Oberhauser 2020): m, 2 m or
    3 m numbers a substep for m Brownian motions.

    Diffrax solvers converge to the Ito solution (`Euler`, `ItoMilstein`) or to the Stratonovich
    one (all others). Whichever the solver, the law here is that of the SDE as given: its drift
    is converted to the kind that the solver needs. Orders of convergence are the solver's;
    `ItoMilstein` and `StratonovichMilstein` fall to strong order 1/2 with noncommutative noise.

    Args:
        solver: a Diffrax Ito or Stratonovich solver such as `diffrax.ShARK()` (additive noise,
            strong order 3/2), `diffrax.SlowRK()` (commutative noise, 3/2) or
            `diffrax.GeneralShARK()`.
        substeps: solver steps for each step of the path.

    Raises:
        TypeError: not a Diffrax solver, or one for other equations.
        ValueError: `substeps` is not a positive integer.
        ImportError: Diffrax is not installed (`pip install 'numpyro-sde[diffrax]'`).

    Example:
        >>> import diffrax, jax, numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        >>> scheme = nsde.schemes.DiffraxSolver(diffrax.ShARK(), substeps=2)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5, 1.0], init=1.0, scheme=scheme)
        >>> path.innovation_shape, path.sample(jax.random.key(0)).shape
        ((2, 4), (3,))
    """

    approximates_sde: ClassVar[bool] = True

    has_density: ClassVar[bool] = False

    solver: Any = eqx.field(static=True)
    substeps: int = eqx.field(static=True)

    def __init__(self, solver: Any, substeps: int = 1) -> None:
        from numpyro_sde.interop import diffrax as interop

        if isinstance(substeps, bool) or not isinstance(substeps, int) or substeps < 1:
            raise ValueError(f"substeps must be a positive integer, got {substeps!r}")
        self.solver = interop.one_step_solver(solver)
        self.substeps = substeps

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse state-dependent noise where the solver is for additive noise.

        Raises:
            ValueError: naming the solver.
        """
        from numpyro_sde.interop import diffrax as interop

        sde.structure(state_shape)
        if interop.needs_additive_noise(self.solver):
            name = f"DiffraxSolver({type(self.solver).__name__}())"
            require_additive(sde, state_shape, name, "use diffrax.SlowRK() or GeneralShARK()")

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        noise = _noise_shape(sde, state_shape)
        count = self.substeps * self._areas
        if count == 1:
            return noise
        return (count * (noise[0] if noise else 1),)

    @property
    def _areas(self) -> int:
        from numpyro_sde.interop import diffrax as interop

        return interop.num_areas(self.solver)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        from numpyro_sde.interop import diffrax as interop

        del cache
        t, x = as_point(t, x)
        h = jnp.asarray(dt, x.dtype) / self.substeps
        noise = _noise_shape(sde, x.shape)
        shape = (self.substeps, self._areas, *noise)
        normals = jnp.reshape(jnp.asarray(z, x.dtype), shape)

        def substep(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
            start, normal = inputs
            return interop.solver_step(self.solver, sde, start, h, state, normal), None

        if self.substeps == 1:
            return substep(x, (t, normals[0]))[0]
        starts = t + h * jnp.arange(self.substeps, dtype=x.dtype)
        return lax.scan(substep, x, (starts, normals))[0]

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        del sde, t, dt, x, x_next, cache
        raise TypeError(
            "DiffraxSolver has no transition density. Use it with reparam.InnovationReparam or for "
            "prediction, or choose Euler(), Milstein() or LocalLinear()"
        )

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        del sde, t, dt, x, x_next, cache
        raise TypeError(
            "DiffraxSolver maps innovations to states only: several innovations lead to one state. "
            "Use Euler(), Milstein() or LocalLinear() to whiten a given path"
        )


def _noise_shape(sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one Brownian increment as the solver sees it."""
    structure = sde.structure(state_shape)
    return structure.diffusion_shape[-1:] if structure.kind == "general" else state_shape
