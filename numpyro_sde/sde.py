"""The stochastic differential equation itself: coefficients, parameters and their batching.

`dX = drift(t, X) dt + diffusion(t, X) dW`, written for ONE state of ONE process. Parameters
are array leaves with declared event dimensions, so that a plate of processes is the same
object with longer leaves; code is static. A path law maps over both (`distributions.path`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.describe import describe_entries, describe_value
from numpyro_sde.dynamics import AbstractDynamics, Structure
from numpyro_sde.inputs import Input, Inputs, StepInputs
from numpyro_sde.linear.small import cholesky
from numpyro_sde.noise import AbstractNoise, Brownian
from numpyro_sde.noise.jumps import AbstractJumps
from numpyro_sde.parameters import Code, Parameters, as_function, broadcast_batch

if TYPE_CHECKING:
    from numpyro_sde.schemes.base import AbstractScheme


class SDE(AbstractDynamics):
    """A stochastic differential equation `dX = drift dt + diffusion dW`.

    Write drift and diffusion for one state of one process; what varies over a plate goes
    through `params`. Subclass it for a named process (`nsde.processes`).

    Args:
        drift: `drift(t, x, p)`, state units per time; returns the shape of `x`, which is `()`
            or `(d,)`. Without `params`, `drift(t, x)`.
        diffusion: `diffusion(t, x, p)`, state units per square root of time; returns a scalar
            or the shape of `x` (independent noise for each component), or shape
            `(*state, m)` for m Brownian motions that all components share.
        params: pytree of arrays, handed to both functions as `p`.
        inputs: known functions of time by name, each an `nsde.Input`; both functions get their
            values at the time as a dict `u`, last: `drift(t, x, p, u)`.
        event_dims: dimensions of each parameter that belong to one process, by key (default 0
            each; `{"A": 2}` for a matrix). Leading dimensions are the batch.
        jumps: a source of jumps such as `nsde.CompoundPoisson`, or several.
        noise: the driving noise.
        interpretation: "ito" or "stratonovich".

    Raises:
        TypeError: coefficients that are no functions of the right arguments, or parameters
            that are no arrays.
        ValueError: an unknown interpretation, or event dimensions that do not fit.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(
        ...     drift=lambda t, x, p: p["rate"] * (p["mean"] - x),
        ...     diffusion=lambda t, x, p: p["scale"],
        ...     params={"rate": 2.0, "mean": 1.0, "scale": 0.5},
        ... )
        >>> float(sde.drift_at(0.0, 0.5))
        1.0
    """

    parameters: Parameters
    drift: Code
    diffusion: Code
    jumps: tuple[AbstractJumps, ...]
    noise: AbstractNoise
    interpretation: str = eqx.field(static=True)
    inputs: Inputs | StepInputs | None
    # Inside one step: a constant added to the drift (an infusion). Never given by a user.
    push: Any

    def __init__(
        self,
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        *,
        params: Any = None,
        event_dims: Any = None,
        inputs: Mapping[str, Input] | None = None,
        jumps: AbstractJumps | Sequence[AbstractJumps] = (),
        noise: AbstractNoise | None = None,
        interpretation: str = "ito",
    ) -> None:
        if interpretation not in ("ito", "stratonovich"):
            raise ValueError(
                f"interpretation must be 'ito' or 'stratonovich', got {interpretation!r}"
            )
        noise = Brownian() if noise is None else noise
        if not isinstance(noise, AbstractNoise):
            raise TypeError(
                f"noise must be a driving noise such as nsde.noise.Brownian(), got "
                f"{type(noise).__name__}"
            )
        self.parameters = Parameters(params, event_dims)
        self.jumps = (jumps,) if isinstance(jumps, AbstractJumps) else tuple(jumps)
        for one in self.jumps:
            if not isinstance(one, AbstractJumps):
                raise TypeError(
                    f"jumps must be nsde.CompoundPoisson(rate, size), or several, got {one!r}"
                )
        if self.jumps and (inputs is not None or not noise.independent):
            raise ValueError("jumps go with Brownian noise and without inputs")
        self.inputs = None if inputs is None else Inputs(inputs)
        self.push = None
        optional = {"p": ("params", params is not None)}
        if inputs is not None:
            optional["u"] = ("inputs", True)
        self.drift = as_function(drift, "drift", "t, x", optional)
        self.diffusion = as_function(diffusion, "diffusion", "t, x", optional)
        self.noise = noise
        self.interpretation = interpretation

    @property
    def params(self) -> Any:
        """The parameters, in the structure in which they were given."""
        return self.parameters.tree

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the parameters, of the noise and of the inputs."""
        own = {"params": self.parameters.batch_shape, "noise": self.noise.batch_shape}
        given = self.inputs.batch_shapes if isinstance(self.inputs, Inputs) else {}
        return broadcast_batch({**own, **given})

    @property
    def breakpoints(self) -> Any:
        """Times at which an input may bend or jump, for `TimeGrid(..., include=)`.

        Shape `(M,)`, or `(*batch, M)` where series have clocks of their own.
        """
        return self.inputs.breakpoints if isinstance(self.inputs, Inputs) else np.zeros(0)

    def driven_by(self, noise: AbstractNoise) -> Self:
        """The same equation with another driving noise.

        Raises:
            TypeError: a noise that is none.
        """
        if not isinstance(noise, AbstractNoise):
            raise TypeError(
                f"noise must be a driving noise such as nsde.noise.Brownian(), got "
                f"{type(noise).__name__}"
            )
        return self._with(noise=noise)

    def during(self, inputs: StepInputs | None, push: Array | None) -> SDE:
        """This equation inside one step of a grid.

        Args:
            inputs: the inputs there; None where it has none.
            push: a constant added to the drift; None for none.
        """
        return self._with(inputs=inputs, push=push)

    def _described(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        entries = describe_entries(self.params)
        if type(self) is SDE:
            code = {"drift": self.drift.function, "diffusion": self.diffusion.function}
            entries = [(role, describe_value(fn)) for role, fn in code.items()] + entries
        if self.inputs is not None:
            entries.append(("inputs", ", ".join(self.inputs.names)))
        if not self.noise.independent:
            entries.append(("noise", describe_value(self.noise)))
        if self.interpretation != "ito":
            entries.append(("interpretation", self.interpretation))
        return entries

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        dims: list[int] = []
        for field in dataclasses.fields(self):  # whatever order classes have given them
            value = getattr(self, field.name)
            if field.metadata.get("static", False):
                continue
            if field.name == "parameters":
                dims += self.parameters.event_dims
            elif field.name == "noise" or isinstance(value, Inputs):
                dims += value.leaf_event_dims()
            else:  # arrays of callables (network weights) are shared by all series: all event
                dims += [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(value)]
        return dims

    def exact_transition(self) -> AbstractScheme | None:
        """The exact transition law, for named processes that have one."""
        return None

    def default_transition(self) -> AbstractScheme | None:
        """The transition law where none is named; None for `Euler()`."""
        if self.jumps:
            from numpyro_sde.schemes.jump_euler import JumpEuler  # schemes know equations

            return JumpEuler()
        return self.exact_transition()

    def check_scheme(self, scheme: AbstractScheme) -> None:
        """Raise a `ValueError` for a scheme that would leave out part of this equation."""
        if self.jumps and not scheme.has_jumps:
            raise ValueError(
                f"{type(scheme).__name__} would leave out the jumps of this SDE: use JumpEuler(), "
                "or JumpMixture() for a scalar process"
            )

    @property
    def is_diffusion(self) -> bool:
        """Whether drift and diffusion are all that moves a state: no jumps, no hidden regime."""
        return not self.jumps

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What coefficients get after time and state: the parameters, if there are any."""
        return () if self.params is None else (self.params,)

    @property
    def positive(self) -> bool:
        """Whether the state of the exact process stays above zero."""
        return False

    def _call(self, fn: Code, t: Any, x: Any) -> Any:
        args = () if self.params is None else (self.params,)
        if self.inputs is not None:
            args = (*args, self.inputs.at(t))
        return fn(t, x, *args)

    def drift_at(self, t: Any, x: Any) -> Array:
        """Drift of an unbatched process at one state, as given (no Ito correction)."""
        drift = jnp.asarray(self._call(self.drift, t, x))
        return drift if self.push is None else drift + self.push

    def diffusion_at(self, t: Any, x: Any) -> Array:
        """Diffusion of an unbatched process at one state, shape as `diffusion` returns it."""
        return jnp.asarray(self._call(self.diffusion, t, x))

    def ito_drift_at(self, t: Any, x: Any) -> Array:
        """Ito drift of an unbatched process at one state.

        A Stratonovich SDE gains `1/2 sum_jk L_kj d_k L_ij` (Kloeden and Platen 1992, 4.9).
        """
        drift = self.drift_at(t, x)
        if self.interpretation == "ito":
            return drift
        x = jnp.asarray(x)
        columns = self.diffusion_columns_at(t, x)
        for j in range(columns.shape[-1]):
            _, along = jax.jvp(lambda s: self.diffusion_columns_at(t, s), (x,), (columns[..., j],))
            drift = drift + 0.5 * along[..., j]
        return drift

    def diffusion_columns_at(self, t: Any, x: Any) -> Array:
        """Diffusion as a matrix `(*state, m)`, one column for each Brownian motion."""
        x = jnp.asarray(x)
        value = self.diffusion_at(t, x)
        if value.ndim > x.ndim:
            return value
        full = jnp.broadcast_to(value, x.shape)
        return full[None] if x.ndim == 0 else jnp.diag(full)

    def noise_factor_at(self, t: Any, x: Any) -> Array:
        """A factor of the instantaneous covariance `L L'` that standard normals can drive.

        Shape of the state where components are independent; else lower triangular `(d, d)`,
        or `(d, m)` with fewer noises than states.
        """
        x = jnp.asarray(x)
        value = self.diffusion_at(t, x)
        if value.ndim <= x.ndim:
            return jnp.broadcast_to(value, x.shape)
        if x.ndim == 0:
            return jnp.abs(value[0]) if value.size == 1 else jnp.sqrt(jnp.sum(value**2))
        if value.shape[1] < value.shape[0]:
            return value
        return cholesky(value @ value.T)

    def structure(self, state_shape: tuple[int, ...]) -> Structure:
        """Read off how the noise enters, checking the shapes of both coefficients.

        Raises:
            ValueError: a drift or diffusion whose shape does not fit the state's.
        """
        if len(state_shape) > 1:
            raise ValueError(f"a state must have shape () or (d,), got {state_shape}")
        one = self.unbatched_shapes()
        x = jax.ShapeDtypeStruct(state_shape, jnp.result_type(float))
        t = jax.ShapeDtypeStruct((), jnp.result_type(float))
        shapes = {}
        for role in ("drift", "diffusion"):
            out = self._eval_shape(one, role, t, x)
            if len(jax.tree_util.tree_leaves(out)) != 1 or not hasattr(out, "shape"):
                raise ValueError(
                    f"{role} must return one array, got {type(out).__name__}: use jnp.stack"
                )
            shapes[role] = tuple(out.shape)
        if shapes["drift"] != state_shape:
            raise ValueError(
                f"drift must return the shape of the state {state_shape}, got {shapes['drift']}"
                f"{self.parameters.batch_hint}"
            )
        got = shapes["diffusion"]
        if got in ((), state_shape):
            return Structure(state_shape, "diagonal", got, state_shape)
        if got[:-1] == state_shape and len(got) == len(state_shape) + 1 and got[-1] > 0:
            if state_shape == ():
                return Structure(state_shape, "diagonal", got, ())
            return Structure(state_shape, "general", got, (min(got[-1], state_shape[0]),))
        raise ValueError(
            f"diffusion must return a scalar, the shape of the state {state_shape}, or "
            f"{(*state_shape, 'm')} for m Brownian motions, got {got}{self.parameters.batch_hint}"
        )

    def _eval_shape(self, one: SDE, role: str, t: Any, x: Any) -> Any:
        try:
            return jax.eval_shape(lambda s, t, x: s._call(getattr(s, role), t, x), one, t, x)
        except (TypeError, ValueError, IndexError) as error:
            hint = self.parameters.batch_hint
            if not hint:
                raise
            raise ValueError(
                f"{role} fails on a state of shape {x.shape}: {error}{hint}"
            ) from error
