"""Laws of a path given parameters and data: Gaussian, or controlled by a network.

Each law stands on the guide of `numpyro_sde.statespace.guide` at the current parameters, so that a
new one is already the exact smoothing law where the model is linear and Gaussian, for every value
of the parameters; what is learned corrects the guide for what is not.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.guides.flows import Conditioner, bounded_input, bounded_log_scale
from numpyro_sde.guides.starts import StartKind, StartLaw
from numpyro_sde.guides.steps import (
    Along,
    Control,
    Pull,
    draw_controlled,
    draw_gaussian,
    weigh_controlled,
    weigh_gaussian,
)
from numpyro_sde.linear.small import matvec
from numpyro_sde.statespace.model import StateSpaceModel

_NUM_HARMONICS = 4


class Sizes(NamedTuple):
    """Sizes that a law's parameters depend on.

    Attributes:
        num_steps: steps of the path.
        num_noises: innovations of a step, flattened.
        dim: components of the carried state.
        num_free: those of the user's state.
        num_data: numbers observed at one time, over all instruments.
        num_theta: length of the vector of shared parameters.
        num_gaps: intervals between times at which anything is observed, both ends counted as such.
    """

    num_steps: int
    num_noises: int
    dim: int
    num_free: int
    num_data: int
    num_theta: int
    num_gaps: int


class Place(NamedTuple):
    """Where a path stands: what its law may look at.

    Attributes:
        along: the guide along the reference.
        center: typical state, `(d,)`.
        spread: typical deviation from it, `(d,)`.
        theta: shared parameters, unconstrained, less their initial values.
        start: how the path begins, "fixed", "normal" or "general".
    """

    along: Along
    center: Array
    spread: Array
    theta: Array
    start: StartKind


class PathLaw(eqx.Module):
    """A family of laws of a path given parameters and data, for `AutoPathGuide`.

    Example:
        >>> from numpyro_sde.guides import ControlledPath, GaussianMarkovPath, PathLaw
        >>> all(issubclass(law, PathLaw) for law in (ControlledPath, GaussianMarkovPath))
        True
    """

    amortized: ClassVar[bool] = False
    owns_start: ClassVar[bool] = False

    def start(
        self,
        init: Any,
        model: StateSpaceModel,
        place: Place,
        params: Any,
        shared: Any,
        local: Any,
    ) -> Any:
        """The first state's law.

        Args:
            init: its law in the model.
            model: the path and its instruments.
            place: where it stands.
            params: from `starts.start_params`; None with `owns_start`, or for a fixed start.
            shared: the law's parameters that all series share.
            local: those of this series.
        """
        del shared, local
        return StartLaw(place.start, init, model, place.along, params)

    @abstractmethod
    def shared_params(self, prefix: str, sizes: Sizes) -> Any:
        """Register parameters shared by all series of a plate."""

    @abstractmethod
    def local_params(self, prefix: str, sizes: Sizes, lead: tuple[int, ...]) -> dict[str, Array]:
        """Register parameters of each series, shape `(*lead, ...)`, in the plates around it."""

    @abstractmethod
    def local_dims(self) -> dict[str, int]:
        """Event dimensions of the local parameters."""

    @abstractmethod
    def draw(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any, x0: Array, z: Array
    ) -> tuple[Array, Array]:
        """A path `(N, *state)` from normals, and its log density given the first state."""

    @abstractmethod
    def log_prob(
        self,
        model: StateSpaceModel,
        place: Place,
        shared: Any,
        local: Any,
        path: Array,
        normals: Array | None = None,
    ) -> Array:
        """Log density of a path given its first state; `normals` are those behind it, if known."""


class GaussianMarkovPath(PathLaw):
    """A Gaussian path with block-tridiagonal precision, at linear cost.

    The model is linearised along the mean of its extended Kalman smoother; every step has a free
    mean, a free gain on the state before and a free covariance, in addition to those of the
    smoother at the current parameters. Cheap and stable; it cannot be skew or have two modes.
    Paths of a positive process are Gaussian in a logarithmic coordinate.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> guide = nsde.guides.AutoPathGuide(model, path=nsde.guides.GaussianMarkovPath())
        >>> svi = numpyro.infer.SVI(
        ...     model, guide, numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO())
        >>> y = jax.numpy.array([0.3, 0.2, -0.1])
        >>> losses = svi.run(jax.random.key(0), 3, y, progress_bar=False).losses
        >>> bool(abs(losses - losses[0]).max() < 0.1)  # linear and Gaussian: exact at once
        True
    """

    def shared_params(self, prefix: str, sizes: Sizes) -> Any:  # noqa: ARG002
        return None

    def local_dims(self) -> dict[str, int]:
        return {"shift": 2, "gain": 3, "factor": 3}

    def local_params(self, prefix: str, sizes: Sizes, lead: tuple[int, ...]) -> dict[str, Array]:
        n, m = sizes.num_steps, sizes.num_noises
        shapes = {"shift": (n, m), "gain": (n, m, sizes.dim), "factor": (n, m, m)}
        return {
            name: numpyro.param(f"{prefix}_{name}", jnp.zeros(lead + shape), event_dim=len(shape))
            for name, shape in shapes.items()
        }

    def state_of(self, model: StateSpaceModel, d: Array, reference: Array) -> Array:
        """The state of a deviation at one time, vectors `(d,)`."""
        return _from_deviation(model, d[None], reference[None])[0][0]

    def control(self, place: Place) -> Control:
        """What is learned, as a map of the guide's pull."""

        def control(local: dict[str, Array], pull: Pull) -> tuple[Array, Array]:
            return local["shift"] + matvec(local["gain"], pull.x / place.spread), local["factor"]

        return control

    def draw(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any, x0: Array, z: Array
    ) -> tuple[Array, Array]:
        del shared
        reference = place.along.guide.reference
        free = _num_free(model)
        d0 = _to_deviation(model, x0[:free], reference[0, :free])
        d0 = jnp.pad(d0, (0, model.dim - free))
        if model.num_times == 1:
            return model.visible(x0[None]), jnp.zeros((), x0.dtype)
        z = jnp.reshape(z, (z.shape[0], -1))
        drawn = draw_gaussian(place.along, self.control(place), local, d0, z, free)
        path, log_det = _from_deviation(model, drawn.deviations[:, :free], reference[:, :free])
        # The first state is handed on as it is, so that no rounding separates the two.
        path = path.at[0].set(x0[:free])
        return model.visible(path), drawn.log_density - log_det

    def log_prob(
        self,
        model: StateSpaceModel,
        place: Place,
        shared: Any,
        local: Any,
        path: Array,
        normals: Array | None = None,
    ) -> Array:
        del shared
        if model.num_times == 1:
            return jnp.zeros((), path.dtype)
        reference = place.along.guide.reference
        x = jnp.reshape(path, (model.num_times, -1))
        free = _num_free(model)
        d = _to_deviation(model, x, reference[:, :free])
        _, log_det = _from_deviation(model, d, reference[:, :free])
        return weigh_gaussian(place.along, self.control(place), local, d, normals) - log_det


class SteeredPath(PathLaw):
    """A law that runs the model's own steps under a control of their innovations."""

    @abstractmethod
    def _prepare(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any
    ) -> tuple[Control, Any]:
        """The control, and what it is told of each step, leading axis over steps."""

    def draw(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any, x0: Array, z: Array
    ) -> tuple[Array, Array]:
        control, now = self._prepare(model, place, shared, local)
        drawn = draw_controlled(model, place.along, control, now, x0, z)
        return model.visible(drawn.states), drawn.log_density

    def log_prob(
        self,
        model: StateSpaceModel,
        place: Place,
        shared: Any,
        local: Any,
        path: Array,
        normals: Array | None = None,
    ) -> Array:
        control, now = self._prepare(model, place, shared, local)
        states = model.scheme.lift(model.sde, model.times, model.dt, path, model.cache)
        states = jnp.reshape(states, (model.num_times, -1))
        return weigh_controlled(model, place.along, control, now, states, normals)


class ControlledPath(SteeredPath):
    r"""The posterior SDE with a learned control: `f + sigma (guide + u(t, x, context))`.

    The path runs the model's own drift and diffusion; its innovations are the guide's, shifted by
    a network and rescaled. The log density ratio to the model is exact on the grid (the discrete
    form of Girsanov's), whatever has been learned.

    Args:
        hidden_dims: widths of the network's hidden layers.
        num_context: length of the context vector that an encoder, a gated recurrent network run
            backward over the data, hands to each step; 0 for none. With an encoder nothing is
            learned for one series alone: the law is amortised, and serves series that it was not
            trained on.

    Source: Li, Wong, Chen, Duvenaud (2020), "Scalable gradients for SDEs", for the bound; Daems,
    Opper, Crevecoeur, Birdal (2024), "Variational inference for SDEs driven by fractional noise",
    for noises with a memory, whose carried state the network sees.

    Raises:
        ValueError: a size that is not positive.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(-1.0, 0.1)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> guide = nsde.guides.AutoPathGuide(model, path=nsde.guides.ControlledPath((16, 16)))
        >>> svi = numpyro.infer.SVI(
        ...     model, guide, numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO(num_particles=4))
        >>> y = jax.numpy.array([-0.9, -1.2, -1.0])
        >>> fit = svi.run(jax.random.key(0), 10, y, progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(1), fit.params, y, sample_shape=(5,))["x"].shape
        (5, 3)
    """

    hidden_dims: tuple[int, ...] = eqx.field(static=True)
    num_context: int = eqx.field(static=True)

    def __init__(self, hidden_dims: tuple[int, ...] = (32, 32), *, num_context: int = 0) -> None:
        self.hidden_dims = check_widths(hidden_dims)
        if num_context < 0:
            raise ValueError(f"num_context must be 0 or more, got {num_context}")
        self.num_context = num_context

    @property
    def amortized(self) -> bool:  # type: ignore[override]
        return self.num_context > 0

    def shared_params(self, prefix: str, sizes: Sizes) -> Any:
        inputs = num_features() + sizes.dim + sizes.num_noises + self.num_context + sizes.num_theta
        network = numpyro.param(
            f"{prefix}_network",
            lambda key: Conditioner.create(key, inputs, self.hidden_dims, 2 * sizes.num_noises),
        )
        return network, register_encoder(prefix, self.num_context, sizes)

    def local_dims(self) -> dict[str, int]:
        return {} if self.amortized else {"shift": 2, "scale": 2}

    def local_params(self, prefix: str, sizes: Sizes, lead: tuple[int, ...]) -> dict[str, Array]:
        shape = (sizes.num_steps, sizes.num_noises)
        return {
            name: numpyro.param(f"{prefix}_{name}", jnp.zeros(lead + shape), event_dim=2)
            for name in self.local_dims()
        }

    def _prepare(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any
    ) -> tuple[Control, Any]:
        network, encoder = shared
        m = place.along.linear.B.shape[-1]
        root = jnp.sqrt(jnp.asarray(model.dt) / observation_spacing(model))
        features = time_features(model)[1:]
        context = jnp.zeros((features.shape[0], 0))
        if encoder is not None:
            context = encode(encoder, model, place)[1:]

        def control(now: Any, pull: Pull) -> tuple[Array, Array]:
            features, context, root, free = now
            x = (pull.x - place.center) / place.spread
            seen = bounded_input(jnp.concatenate([x, pull.half]))
            out = network(jnp.concatenate([features, seen, context, place.theta]))
            shift, scale = root * out[:m], bounded_log_scale(out[m:])
            if free:
                shift, scale = shift + free["shift"], scale + free["scale"]
            return shift, scale

        return control, (features, context, root, local)


def _num_free(model: StateSpaceModel) -> int:
    """Components of the user's state."""
    if model.state_shape is None:
        return model.dim
    return int(np.prod(model.state_shape, dtype=int))


def _to_deviation(model: StateSpaceModel, x: Array, reference: Array) -> Array:
    if model.sde.positive:
        return reference * jnp.log(x / reference)
    return x - reference


def _from_deviation(model: StateSpaceModel, d: Array, reference: Array) -> tuple[Array, Array]:
    """States of deviations, and the log of the map's Jacobian after the first time."""
    if model.sde.positive:
        return reference * jnp.exp(d / reference), jnp.sum(d[1:] / reference[1:])
    return reference + d, jnp.zeros((), d.dtype)


def check_widths(hidden_dims: Any) -> tuple[int, ...]:
    """Hidden widths as a tuple of positive integers."""
    widths = tuple(hidden_dims)
    if not widths or any(int(w) != w or w < 1 for w in widths):
        raise ValueError(f"hidden_dims must be positive widths, got {hidden_dims!r}")
    return tuple(int(w) for w in widths)


def observed_rows(model: StateSpaceModel) -> np.ndarray:
    """Grid indices at which anything may be observed, increasing."""
    rows = [np.asarray(i.rows, int) for i in model.instruments]
    return np.unique(np.concatenate(rows)) if rows else np.zeros(0, int)


def gap_rows(model: StateSpaceModel) -> np.ndarray:
    """Grid indices of the ends of the intervals between observations, both ends of the path too."""
    return np.union1d(observed_rows(model), [0, model.num_times - 1])


def observation_spacing(model: StateSpaceModel) -> Array:
    """Mean time between observations: the unit of time of a control."""
    times = jnp.asarray(model.times)
    return (times[-1] - times[0]) / max(len(observed_rows(model)), 1)


def num_features() -> int:
    """Length of `time_features` at one time."""
    return 3 + 2 * _NUM_HARMONICS


def time_features(model: StateSpaceModel) -> Float[Array, "N features"]:
    """What a network is told of each grid time.

    The time from -1 to 1 with harmonics, and the times since the last observation and to the next
    one (this time's own included), in units of their mean distance, at most 3.
    """
    times = jnp.asarray(model.times, jnp.result_type(float))
    rows, index = observed_rows(model), np.arange(model.num_times)
    span = times[-1] - times[0]
    share = jnp.where(span > 0, (times - times[0]) / jnp.where(span > 0, span, 1.0), 0.0)
    unit = jnp.where(span > 0, observation_spacing(model), 1.0)
    if len(rows):
        place = np.searchsorted(rows, index)  # the first observation at this time or later
        after = rows[np.minimum(place, len(rows) - 1)]
        before = rows[np.maximum(place - 1, 0)]
        to_next = jnp.where(place < len(rows), (times[after] - times) / unit, 3.0)
        since = jnp.where(place > 0, (times - times[before]) / unit, 3.0)
    else:
        to_next = since = jnp.full(times.shape, 3.0)
    near = [jnp.clip(to_next, 0.0, 3.0), jnp.clip(since, 0.0, 3.0)]
    angles = jnp.pi * share[:, None] * jnp.arange(1, _NUM_HARMONICS + 1)[None]
    return jnp.concatenate(
        [2 * share[:, None] - 1, jnp.stack(near, 1), jnp.sin(angles), jnp.cos(angles)], axis=1
    )


def register_encoder(prefix: str, num_context: int, sizes: Sizes) -> Any:
    """A gated recurrent network over the data, or None."""
    if num_context == 0:
        return None
    inputs = 2 * sizes.num_data + sizes.dim + 1

    def create(key: PRNGKeyArray) -> Any:
        return eqx.nn.GRUCell(inputs, num_context, key=key)

    return numpyro.param(f"{prefix}_encoder", create)


def encode(encoder: Any, model: StateSpaceModel, place: Place) -> Float[Array, "N context"]:
    """Context at each grid time: a summary of the data from then on."""
    parts = []
    for instrument in model.instruments:
        seen = jnp.asarray(instrument.present, jnp.result_type(float))
        values = jnp.asarray(instrument.values)
        # Data have units that a network need not know.
        count = jnp.maximum(jnp.sum(seen, 0), 1.0)
        mean = jnp.sum(values * seen, 0) / count
        centred = values - mean[None]
        scale = jnp.sqrt(jnp.sum(seen * centred**2, 0) / count)
        scale = jnp.where(scale > 0, scale, 1.0)
        parts += [seen * centred / scale[None], seen]
    reference = (place.along.guide.reference - place.center[None]) / place.spread[None]
    steps = jnp.concatenate([jnp.asarray(model.dt), jnp.zeros(1)]) / observation_spacing(model)
    inputs = jnp.concatenate([*parts, bounded_input(reference), steps[:, None]], axis=1)

    def step(hidden: Array, now: Array) -> tuple[Array, Array]:
        hidden = encoder(now, hidden)
        return hidden, hidden

    start = jnp.zeros(encoder.hidden_size, inputs.dtype)
    _, context = lax.scan(step, start, inputs, reverse=True)
    return context
