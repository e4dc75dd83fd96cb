"""What a filter works on, and what it returns: one model type, one result type.

Everything is unbatched and NumPyro-free: one process, one path, its instruments. States are
vectors `(d,)` here, scalar processes included. Batches are mapped by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from numpyro_sde.describe import describe_module, html_text
from numpyro_sde.linear.small import matvec
from numpyro_sde.linear.smoothing import BackwardKernel, draw_backward, moments_backward
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.schemes.events import ForcedScheme
from numpyro_sde.sde import SDE


class Instrument(NamedTuple):
    """One observation statement, laid out on the whole grid of N times.

    Attributes:
        inputs: pytree of what the emission needs at each time, leading axis N.
        values: observations, shape `(N, p)`; 0 where missing.
        present: whether a component was observed, shape `(N, p)`.
        moments: `moments(inputs_k, x)` returns mean `(p,)` and covariance `(p, p)` of the
            observation given one state `(d,)`.
        log_prob: `log_prob(inputs_k, x, y, present)` of one observation given one state.
        gaussian: whether the emission is Gaussian, with any mean and covariance.
        diagonal: whether its components are independent given the state.
        variances: for components that are independent given the state, `moments` with the
            variances `(p,)` in place of the covariance: many instruments need no matrix; or None.
        exact: whether it is a point mass: a component seen without noise.
        rows: grid indices at which anything may be observed (host side, increasing).
        has_moments: whether the emission has a mean and a variance; None where traced parameters
            decide.
        law: `law(inputs_k, x)`, the observation's distribution given one state, for predictions
            of emissions that are not normal; None where that is not known.
        powered: whether the likelihood is raised to a power. `log_prob` is then that of the power,
            and `moments` are those of the normal law that a normal density's power is, up to
            `log_scale`.
        log_scale: `log_scale(x)`, for normal emissions whose covariance does not depend on the
            state: the log of what that normal law lacks, at each time, shape `(N,)`.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro.distributions as dist
        >>> from numpyro_sde.filters import Instrument
        >>> y = np.array([[0.3], [np.nan], [-0.1]])  # N(x, 0.5), missing at the second time
        >>> seen = ~np.isnan(y)
        >>> thermometer = Instrument(
        ...     inputs=None,
        ...     values=jnp.where(seen, y, 0.0),
        ...     present=jnp.asarray(seen),
        ...     moments=lambda inputs, x: (x, 0.25 * jnp.eye(1)),
        ...     log_prob=lambda inputs, x, y, seen: jnp.sum(dist.Normal(x, 0.5).log_prob(y) * seen),
        ...     gaussian=True,
        ...     rows=np.flatnonzero(seen),
        ... )
        >>> thermometer.rows.tolist()
        [0, 2]
    """

    inputs: Any
    values: Float[Array, "N p"]
    present: Bool[Array, "N p"]
    moments: Callable[[Any, Array], tuple[Array, Array]]
    log_prob: Callable[[Any, Array, Array, Array], Array]
    gaussian: bool
    rows: Any
    diagonal: bool = False
    has_moments: bool | None = True
    exact: bool = False
    variances: Callable[[Any, Array], tuple[Array, Array]] | None = None
    law: Callable[[Any, Array], Any] | None = None
    powered: bool = False
    log_scale: Callable[[Array], Array] | None = None


class StateSpaceModel(NamedTuple):
    """A path on its grid and everything that observes it.

    Attributes:
        sde: the unbatched equation, or the dynamics of a process that only jumps.
        scheme: its transition density over a grid step, and whether the user chose it.
        scheme_chosen: False where the scheme is only the default for paths.
        times: grid times, shape `(N,)`; NumPy where they are known before tracing.
        dt: step lengths, shape `(N - 1,)`.
        cache: what the scheme prepared for the grid.
        init_mean: mean of the first state, shape `(d,)`.
        init_cov: its covariance, shape `(d, d)`.
        init_gaussian: whether the first state is normal (a fixed one counts).
        init_kind: "normal"; "flat", the improper law of density 1; "moments", another law with the
            mean and covariance given; "none", a law without them.
        scalar: whether the process is written for states of shape `()`.
        instruments: the observation statements.
        starts: draws of the first state, `(M, d)`, for methods that need them where it is not
            normal.
        state_shape: shape of the user's state where the model's carries more (a scheme with
            memory), behind it; None where the two are the same.
        markovian: the same model in continuous time, where the noise has a memory and is carried
            along by the SDE itself; for filters that are exact for linear SDEs.
        start_agrees: log density of what is read without noise of a first state that is known: 0,
            or minus infinity where they disagree; None where nothing is.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde import filters, processes, schemes
        >>> times = np.array([0.0, 0.1, 0.3])
        >>> model = filters.StateSpaceModel(
        ...     sde=processes.DoubleWell(linear=2.0, cubic=2.0, scale=0.7),
        ...     scheme=schemes.Euler(), scheme_chosen=True,
        ...     times=times, dt=np.diff(times), cache=None,
        ...     init_mean=jnp.zeros(1), init_cov=jnp.eye(1), init_gaussian=True,
        ...     scalar=True, instruments=(),
        ... )
        >>> model.dim, model.num_times, float(model.drift(0.0, jnp.array([2.0]))[0])
        (1, 3, -12.0)
    """

    sde: Any
    scheme: AbstractScheme
    scheme_chosen: bool
    times: Any
    dt: Any
    cache: Any
    init_mean: Float[Array, " d"]
    init_cov: Float[Array, "d d"]
    init_gaussian: bool
    scalar: bool
    instruments: tuple[Instrument, ...]
    starts: Any = None
    state_shape: tuple[int, ...] | None = None
    markovian: Any = None
    init_kind: str = "normal"
    start_agrees: Any = None

    @property
    def dim(self) -> int:
        """Number d of state components."""
        return self.init_mean.shape[0]

    @property
    def visible_size(self) -> int:
        """Number of components of the user's state, which come first."""
        return self.dim if self.state_shape is None else math.prod(self.state_shape)

    def visible(self, states: Float[Array, "*n d"]) -> Array:
        """The user's part of states, in the shape of the user's state."""
        if self.state_shape is None:
            return states[..., 0] if self.scalar else states
        return states[..., 0] if self.state_shape == () else states[..., : self.state_shape[0]]

    @property
    def num_times(self) -> int:
        """Number N of grid times."""
        return jnp.shape(self.times)[0]

    def to_state(self, x: Array) -> Array:
        """A vector `(d,)` as the state that the user's functions take."""
        return x[0] if self.scalar else x

    def drift(self, t: Any, x: Array) -> Float[Array, " d"]:
        """Ito drift at a vector state; a process that only jumps has none."""
        if not isinstance(self.sde, SDE):
            return jnp.zeros_like(x)
        return jnp.reshape(self.sde.ito_drift_at(t, self.to_state(x)), (self.dim,))

    def factor(self, t: Any, x: Array) -> Float[Array, "d m"]:
        """Diffusion matrix at a vector state, one column for each Brownian motion, if any."""
        if not isinstance(self.sde, SDE):
            return jnp.zeros((self.dim, 1), x.dtype)
        columns = self.sde.diffusion_columns_at(t, self.to_state(x))
        return jnp.reshape(columns, (self.dim, columns.shape[-1]))

    def step_law(
        self, t: Any, dt: Any, x: Array, cache: Any = None
    ) -> tuple[Float[Array, " d"], Float[Array, "d m"]]:
        """Mean of the scheme's transition from a vector state, and a factor of its covariance.

        Raises:
            ValueError: the scheme's transition is not Gaussian.
        """
        if not isinstance(self.scheme, GaussianScheme):
            raise ValueError(
                f"the transition of {type(self.scheme).__name__} is not Gaussian; filters that "
                "propagate two moments need Euler(), LocalLinear() or Kessler()"
            )
        mean, factor = self.scheme.moments(self.sde, t, dt, self.to_state(x), cache)
        mean = jnp.reshape(mean, (self.dim,))
        if jnp.ndim(factor) < 2:
            return mean, jnp.diag(jnp.reshape(factor, (self.dim,)))
        return mean, factor

    def step_moments(
        self, t: Any, dt: Any, x: Array, cache: Any = None
    ) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """Mean and covariance of the scheme's transition from a vector state.

        Raises:
            ValueError: the scheme's transition is not Gaussian.
        """
        mean, factor = self.step_law(t, dt, x, cache)
        return mean, factor @ factor.T

    def in_step(self, t: Any, cache: Any) -> StateSpaceModel:
        """The model inside the step that starts at t: drift and diffusion see its inputs there."""
        if not isinstance(self.scheme, ForcedScheme):
            return self
        return self._replace(sde=self.scheme.during(self.sde, t, cache))

    def open_step(self, x: Array, cache: Any) -> Array:
        """State after the events that open a step, from the one before; the same without any."""
        if not self.has_events:
            return x
        opened = cast("ForcedScheme", self.scheme).open(self.sde, self.to_state(x), cache)
        return jnp.reshape(opened, (self.dim,)).astype(x.dtype)

    def enter(self, step: Any, x: Array) -> tuple[Array, StateSpaceModel]:
        """State after the events that open a step, and the model inside it."""
        t, _, cache = step
        return self.open_step(x, cache), self.in_step(t, cache)

    @property
    def has_events(self) -> bool:
        """Whether events may open steps."""
        return isinstance(self.scheme, ForcedScheme) and bool(self.scheme.rules)

    def with_scheme(self, scheme: AbstractScheme) -> StateSpaceModel:
        """The same model, inputs and events included, moved by another scheme."""
        cache = scheme.prepare(self.sde, self.times, self.dt) if self.num_times > 1 else None
        if isinstance(self.scheme, ForcedScheme):
            scheme, cache = self.scheme.around(scheme), self.cache._replace(inner=cache)
        return self._replace(scheme=scheme, cache=cache)

    def step_inputs(self) -> Any:
        """Time, length and cache of each step, leading axis `N - 1`, for a scan."""
        return jax.tree.map(
            jnp.asarray, (jnp.asarray(self.times)[:-1], jnp.asarray(self.dt), self.cache)
        )

    def observation_inputs(self) -> Any:
        """Inputs, values and presence of each instrument, leading axis N, for a scan."""
        return tuple((i.inputs, i.values, i.present) for i in self.instruments)


class FilterResult(eqx.Module):
    """What every filter returns; moments, or weighted particles.

    Attributes:
        times: grid times, shape `(N,)`.
        log_likelihood: log density of all observations.
        increments: its terms, `log p(y_k | y_1..y_k-1)`, shape `(N,)`; 0 where nothing was
            observed.
        mean: filtered means, shape `(N, d)`.
        cov: filtered covariances, shape `(N, d, d)`.
        predicted_mean: means before the observation at the same time, shape `(N, d)`.
        predicted_cov: covariances before it, shape `(N, d, d)`.
        cross: covariance of the filtered state at k with the predicted one at k + 1, shape
            `(N - 1, d, d)`: what smoothing needs.
        particles: filtered particles, shape `(N, M, d)`, or None.
        log_weights: their normalised log weights, shape `(N, M)`, or None.
        kernel: law of each state given the next, where the filter has a better one than
            `cross` gives.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1, 0.2], init=dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.2, -0.1],
        ...     method=nsde.filters.ExtendedKalman(),
        ... )
        >>> result.mean.shape, result.cov.shape, result.cross.shape
        ((3, 1), (3, 1, 1), (2, 1, 1))
        >>> bool(abs(result.increments.sum() - result.log_likelihood) < 1e-5)
        True
    """

    times: Any
    log_likelihood: Float[Array, ""]
    increments: Float[Array, " N"]
    mean: Float[Array, "N d"]
    cov: Float[Array, "N d d"]
    predicted_mean: Float[Array, "N d"]
    predicted_cov: Float[Array, "N d d"]
    cross: Float[Array, "{N}-1 d d"] | None
    particles: Any = None
    log_weights: Any = None
    kernel: BackwardKernel | None = None

    def backward_kernel(self) -> BackwardKernel:
        """Law of each state given the next and the observations up to its own time.

        The filter's own where it gave one; else by the gains `cross @ predicted_cov^-1` of
        Rauch, Tung and Striebel (1965).
        """
        if self.kernel is not None:
            return self.kernel
        assert self.cross is not None
        gain = jax.vmap(_right_divide)(self.cross, self.predicted_cov[1:])
        rest = self.cov[:-1] - gain @ jnp.swapaxes(self.cross, -1, -2)
        return BackwardKernel(
            gain=gain,
            offset=jnp.concatenate(
                [self.mean[:-1] - matvec(gain, self.predicted_mean[1:]), self.mean[-1:]]
            ),
            factor=jax.vmap(_psd_root)(jnp.concatenate([rest, self.cov[-1:]])),
        )

    def smooth(self) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
        """Smoothed means and covariances, given all observations."""
        return _smooth(self)

    def sample(self, key: PRNGKeyArray, num_draws: int = 1) -> Float[Array, "draws N d"]:
        """Draw paths from the smoothing law: forward filtering, backward sampling.

        Exact for linear-Gaussian models (Carter and Kohn 1994); for the approximate filters a
        draw of the Gaussian approximation.
        """
        return _sample(self, key, num_draws)


@jax.jit
def _smooth(result: FilterResult) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
    smoothed = moments_backward(result.backward_kernel())
    return smoothed.mean, smoothed.cov


@partial(jax.jit, static_argnums=2)
def _sample(result: FilterResult, key: PRNGKeyArray, num_draws: int) -> Float[Array, "draws N d"]:
    normals = jax.random.normal(key, (num_draws, *result.mean.shape), result.mean.dtype)
    return draw_backward(result.backward_kernel(), normals)


def _right_divide(cross: Array, cov: Array) -> Array:
    # A component without uncertainty (a fixed start) makes cov singular; its gain is 0.
    values, vectors = jnp.linalg.eigh(0.5 * (cov + cov.T))
    floor = jnp.finfo(cov.dtype).eps * cov.shape[0] * jnp.max(jnp.abs(values))
    inverse = jnp.where(values > floor, 1.0 / jnp.where(values > floor, values, 1.0), 0.0)
    return cross @ (vectors * inverse[None]) @ vectors.T


def _psd_root(cov: Array) -> Array:
    values, vectors = jnp.linalg.eigh(0.5 * (cov + cov.T))
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]


class AbstractFilter(eqx.Module):
    """A way to integrate a path out: `marginalize(model, method=...)`.

    A subclass defines `filter`; a model that it cannot treat it refuses in `check`.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> class VagueStart(nsde.filters.AbstractFilter):
        ...     inner: nsde.filters.AbstractFilter
        ...     def filter(self, model):
        ...         return self.inner.filter(model._replace(init_cov=100.0 * model.init_cov))
        >>> sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1], init=dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.2],
        ...     method=VagueStart(nsde.filters.ExtendedKalman()),
        ... )
        >>> round(float(result.predicted_cov[0, 0, 0]), 2)
        100.0
    """

    def __repr__(self) -> str:
        return describe_module(self)

    def _repr_html_(self) -> str:
        return html_text(repr(self))

    def check(self, model: StateSpaceModel) -> None:
        """Raise a `ValueError` where the method cannot treat this model."""

    @property
    def weighs_by_density(self) -> bool:
        """Whether every emission enters by its `log_prob`, never by its moments."""
        return False

    @property
    def num_starts(self) -> int:
        """Draws of the first state that the method needs where it is not normal; 0 for none."""
        return 0

    @property
    def random_key(self) -> PRNGKeyArray | None:
        """The key of its random numbers; None for methods without any."""
        return None

    def with_key(self, key: PRNGKeyArray) -> AbstractFilter:  # noqa: ARG002
        """The same method on other random numbers."""
        return self

    def for_smoothing(self) -> AbstractFilter:
        """The same method, keeping what draws of the path need."""
        return self

    def simulator(self, path: Any) -> Any:
        """The path law to simulate where the method discretises otherwise than the path."""
        return path

    def filter(self, model: StateSpaceModel) -> FilterResult:
        """Run the filter over the grid."""
        raise NotImplementedError

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        """Log density of all observations."""
        return self.filter(model).log_likelihood

    def increments(self, model: StateSpaceModel) -> Float[Array, " N"]:
        """Terms of the log likelihood, one for each grid time."""
        return self.filter(model).increments
