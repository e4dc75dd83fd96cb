"""Underdamped Langevin dynamics as an MCMC kernel, without an accept-reject step.

    dx = v dt,    dv = -friction v dt - grad f(x) dt + sqrt(2 friction) dW,    f = -log density

leaves `exp(-f(x) - |v|^2 / 2)` invariant; a solver with a finite step leaves a law near it.
Positions are measured in scales that warm-up finds, so one step size serves all of them: the
square root of the ratio of standard deviations of positions and of gradients, which for
independent normals is right long before they are explored (Seyboldt, Carlson and Carpenter 2026,
"Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro.infer.hmc_util import welford_covariance
from numpyro.infer.initialization import init_to_uniform

from numpyro_sde.infer.unconstrained import UnconstrainedKernel
from numpyro_sde.statespace.checks import check_choice, check_count

SOLVERS = ("ubu", "quicsort")
# Ends of the windows of warm-up, as shares of it, after each of which the scales are set anew.
_WINDOWS = (0.05, 0.1, 0.2, 0.45, 0.9)
# Rise of the energy over one draw above which it is given up, as in NUTS.
_LARGEST_RISE = 1000.0


class UnderdampedLangevinState(NamedTuple):
    """State of `UnderdampedLangevin`.

    Attributes:
        i: number of draws so far.
        z: unconstrained values by site.
        potential_energy: minus the log density there.
        velocity: of all of them as one vector, in units of `scale` for each unit of time.
        scale: what positions are measured in, `(D,)`.
        moments: running moments of positions and gradients behind the next `scale`.
        num_grad: gradients that the last draw took.
        diverging: whether the last draw was given up: its energy rose by more than 1,000. The
            chain then stays where it was, with a new velocity.
        rng_key: key of the next draw.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.UnderdampedLangevinState._fields[:3]
        ('i', 'z', 'potential_energy')
    """

    i: Int[Array, ""]
    z: dict[str, Array]
    potential_energy: Float[Array, ""]
    velocity: Float[Array, " D"]
    scale: Float[Array, " D"]
    moments: Any
    num_grad: Int[Array, ""]
    diverging: Bool[Array, ""]
    rng_key: PRNGKeyArray


class UnderdampedLangevin(UnconstrainedKernel):
    """Unadjusted underdamped Langevin Monte Carlo.

    For posteriors that are smooth and not far from log-concave, in many dimensions: no gradient is
    lost to rejections. There is no accept-reject step, so draws follow the posterior only up to a
    bias that falls as a power of the step h: the variance of a standard normal is too small by
    `h^2 / 6` with "ubu", too large by about `0.02 h^3` with "quicsort" at friction 2, and
    directions of variance s in standard units have the bias of `h / sqrt(s)`. Halve the step to
    see it. Not for heavy tails, funnels or hard boundaries, where a fixed step diverges: use NUTS.

    Args:
        model: the model, or None with `potential_fn`.
        step_size: length h of a step; times the velocity, which is standard normal, it is a
            length in the scales that warm-up finds. Above twice the smallest standard deviation
            of the scaled posterior it diverges.
        friction: rate at which velocities forget, above 0.
        solver: "ubu" (one gradient a step, order 2) or "quicsort" (two, order 3; needs Diffrax).
        num_steps: steps between draws.
        potential_fn: minus a log density of unconstrained values, instead of a model; then `run`
            needs `init_params`.
        init_strategy: where chains begin, one of `numpyro.infer.init_to_*`.

    Raises:
        ValueError: an option out of range; both or neither of `model` and `potential_fn`.
        TypeError: a count that is no integer.
        ImportError: "quicsort" without Diffrax.

    Extra fields are `num_grad` (one more than the steps take, for the check of the energy) and
    `diverging`. With a warm-up of fewer than 20 draws positions keep unit scale.

    Source: Sanz-Serna and Zygalakis (2021), "Wasserstein distance estimates for the distributions
    of numerical approximations to ergodic stochastic differential equations", for UBU; Foster,
    Lyons and Oberhauser (2021), "The shifted ODE method for underdamped Langevin MCMC".

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 2.0))
        >>> kernel = nsde.infer.UnderdampedLangevin(model, step_size=0.4)
        >>> mcmc = MCMC(kernel, num_warmup=300, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), extra_fields=("num_grad",))
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 3.0) < 0.5)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        step_size: float = 0.25,
        friction: float = 2.0,
        solver: str = "ubu",
        num_steps: int = 8,
        potential_fn: Callable[[Any], Any] | None = None,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(model, potential_fn, init_strategy)
        for name, value in (("step_size", step_size), ("friction", friction)):
            if not (np.ndim(value) == 0 and 0 < value < np.inf):
                raise ValueError(f"{name} must be one positive number, got {value!r}")
        check_choice("solver", solver, SOLVERS)
        check_count("num_steps", num_steps)
        if solver == "quicsort":
            import numpyro_sde.interop.diffrax  # noqa: F401
        self.step_size, self.friction = float(step_size), float(friction)
        self.solver, self.num_steps = solver, num_steps

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "diverging")

    def get_diagnostics_str(self, state: UnderdampedLangevinState) -> str:
        return f"{int(jnp.max(state.num_grad))} gradients a draw, step {self.step_size:.2g}"

    def _first(self, key: PRNGKeyArray, z: Any, args: Any, kwargs: Any) -> UnderdampedLangevinState:
        flat, _ = ravel_pytree(z)
        key, own = jax.random.split(key)
        value, gradient = jax.value_and_grad(self._potential(args, kwargs))(z)
        # Where nothing is known a gradient of size g is taken for that of a scale 1 / g.
        size = jnp.abs(ravel_pytree(gradient)[0])
        scale = jnp.where(jnp.isfinite(size), 1.0 / jnp.maximum(size, 1.0), 1.0)
        return UnderdampedLangevinState(
            jnp.zeros((), int),
            z,
            value,
            jax.random.normal(own, flat.shape, flat.dtype),
            scale if self._adapts else jnp.ones_like(flat),
            _no_moments(flat),
            jnp.zeros((), int),
            jnp.zeros((), bool),
            key,
        )

    def _step(
        self, state: UnderdampedLangevinState, args: Any, kwargs: Any
    ) -> UnderdampedLangevinState:
        flat, back = ravel_pytree(state.z)
        potential = self._potential(args, kwargs)
        slope = jax.value_and_grad(lambda x: potential(back(x)))
        scale = state.scale
        move = stepper(
            self.solver, lambda q: scale * slope(scale * q)[1], self.step_size, self.friction
        )
        rng_key, noise_key, turn_key = jax.random.split(state.rng_key, 3)

        def one(now: tuple[Array, Array], key: PRNGKeyArray) -> tuple[tuple[Array, Array], None]:
            normals = jax.random.normal(key, (move.num_normals, flat.size), flat.dtype)
            return move.step(*now, normals), None

        keys = jax.random.split(noise_key, self.num_steps)
        (q, v), _ = jax.lax.scan(one, (flat / scale, state.velocity), keys)
        value, gradient = slope(scale * q)
        rise = (
            value
            - state.potential_energy
            + 0.5 * jnp.sum((v - state.velocity) * (v + state.velocity))
        )
        # A start of density zero may be left by any finite move.
        fell = jnp.isfinite(value) & ~jnp.isfinite(state.potential_energy)
        kept = ((rise < _LARGEST_RISE) | fell) & jnp.all(jnp.isfinite(gradient))
        flat = jnp.where(kept, scale * q, flat)
        state = state._replace(
            z=back(flat),
            potential_energy=jnp.where(kept, value, state.potential_energy),
            velocity=jnp.where(kept, v, jax.random.normal(turn_key, v.shape, v.dtype)),
            num_grad=jnp.asarray(self.num_steps * move.num_gradients + 1),
            diverging=~kept,
            rng_key=rng_key,
        )
        if self._adapts:
            state = self._adapt(state, flat, gradient)
        return state._replace(i=state.i + 1)

    @property
    def _adapts(self) -> bool:
        return self._num_warmup >= 20

    def _adapt(
        self, state: UnderdampedLangevinState, flat: Array, gradient: Array
    ) -> UnderdampedLangevinState:
        """Gather moments in windows of warm-up; halve the scales where a draw diverged."""
        ends = jnp.asarray([int(share * self._num_warmup) for share in _WINDOWS])
        warming = state.i < ends[-1]
        _, gather, _ = welford_covariance(diagonal=True)
        use = warming & ~state.diverging
        moments = jax.tree.map(
            lambda new, old: jnp.where(use, new, old),
            tuple(gather(x, m) for x, m in zip((flat, gradient), state.moments, strict=True)),
            state.moments,
        )
        scale = jnp.where(warming & state.diverging, 0.5 * state.scale, state.scale)
        (_, spread, count), (_, steepness, _) = moments
        known = jnp.sqrt(jnp.sqrt(spread / steepness))
        usable = jnp.isfinite(known) & (known > 0) & (count > 2)
        closes = jnp.any(state.i == ends - 1)
        scale = jnp.where(closes & usable, known, scale)
        moments = jax.tree.map(
            lambda new, old: jnp.where(closes, new, old), _no_moments(flat), moments
        )
        return state._replace(scale=scale, moments=moments)

    def refresh(
        self, state: UnderdampedLangevinState, model_args: Any, model_kwargs: Any
    ) -> UnderdampedLangevinState:
        """The state with the energy that other blocks' moves have changed."""
        kwargs = {} if model_kwargs is None else model_kwargs
        return state._replace(potential_energy=self._potential(model_args, kwargs)(state.z))


def _no_moments(flat: Array) -> tuple[Any, Any]:
    """Running mean, sum of squares and count of nothing, for positions and for gradients."""
    zero = jnp.zeros_like(flat)
    none = zero, zero, jnp.zeros((), int)
    return none, none


class Stepper(NamedTuple):
    """One step of a solver: `step(x, v, normals)`, with normals of shape `(num_normals, D)`."""

    step: Callable[[Array, Array, Array], tuple[Array, Array]]
    num_normals: int
    num_gradients: int


def stepper(
    solver: str, gradient: Callable[[Array], Array], step_size: float, friction: float
) -> Stepper:
    """A step of underdamped Langevin dynamics of unit mass and temperature."""
    if solver == "quicsort":
        from numpyro_sde.interop.diffrax import langevin_step

        def quicsort(x: Array, v: Array, normals: Array) -> tuple[Array, Array]:
            return langevin_step(gradient, step_size, friction, x, v, normals)

        return Stepper(quicsort, 3, 2)
    keep, glide, noise = _free_motion(0.5 * step_size, friction)

    def drift(x: Array, v: Array, normals: Array) -> tuple[Array, Array]:
        first, second = normals
        return (
            x + glide * v + noise[0, 0] * first,
            keep * v + noise[1, 0] * first + noise[1, 1] * second,
        )

    def ubu(x: Array, v: Array, normals: Array) -> tuple[Array, Array]:
        x, v = drift(x, v, normals[:2])
        return drift(x, v - step_size * gradient(x), normals[2:])

    return Stepper(ubu, 4, 1)


def _free_motion(t: float, friction: float) -> tuple[float, float, np.ndarray]:
    """The exact law of `dx = v dt, dv = -friction v dt + sqrt(2 friction) dW` after time t.

    What is kept of the velocity, what it adds to the position, and the Cholesky factor of the
    covariance of position and velocity.
    """
    g = friction * t
    keep, glide = math.exp(-g), -math.expm1(-g) / friction
    # 2 g - 3 + 4 e^-g - e^-2g, which cancels to 2 g^3 / 3.
    series = sum((-1.0) ** k * (4.0 - 2.0**k) * g**k / math.factorial(k) for k in range(3, 20))
    spread = series if g < 0.5 else 2.0 * g - 3.0 + 4.0 * keep - keep**2
    both = (1.0 - keep) ** 2 / friction
    cov = np.array([[spread / friction**2, both], [both, -math.expm1(-2.0 * g)]])
    return keep, glide, np.linalg.cholesky(cov)
