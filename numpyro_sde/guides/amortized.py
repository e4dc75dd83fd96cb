"""Guides of populations: an encoder gives each series' parameters, whatever the number of series.

A guide with parameters for every series grows with their number, and a mini-batch trains only the
series in it. An encoder (Kingma and Welling 2014; Gershman and Goodman 2014, "Amortized inference
in probabilistic reasoning") maps what was observed of a series, and the population's parameters, to
the law of its own parameters: a mini-batch trains it for all series.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoMultivariateNormal


def panel_features(times: Any, values: ArrayLike) -> Float[np.ndarray, "series features"]:
    """What an encoder is given of each series: gaps, data and where they are missing.

    Columns have mean 0 and variance 1 over the series; missing data stand at the mean.

    Args:
        times: a `TimeGrid` of panel times or times `(series, T)`.
        values: data `(series, T, ...)`, NaN where missing.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.guides import panel_features
        >>> panel_features(np.cumsum(np.ones((4, 3)), axis=1), np.arange(12.0).reshape(4, 3)).shape
        (4, 8)
    """
    clock = np.asarray(getattr(times, "observation_times", times), np.float64)
    y = np.asarray(values, np.float64).reshape(len(clock), -1)
    seen = np.isfinite(y)
    count = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, y, 0.0).sum(0) / count
    gaps = np.log(np.diff(clock, axis=-1))
    columns = np.concatenate([gaps, np.where(seen, y, mean), seen], axis=-1)
    spread = columns.std(0)
    return (columns - columns.mean(0)) / np.where(spread > 1e-12, spread, 1.0)


def _same(a: Any, b: Any) -> bool:
    """Whether two bounds are one number; traced ones are not known to be."""
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    return a is b or bool(np.all(np.asarray(a == b)))


class _Local(NamedTuple):
    """How a site of the series is made of numbers without bounds."""

    transform: Any
    event_dim: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @classmethod
    def of(cls, name: str, law: dist.Distribution, bounds: list[tuple[Any, Any]]) -> _Local:
        moving = any(np.ndim(a) or not _same(a, b) for a, b in bounds)
        if moving or law.is_discrete:
            raise ValueError(
                f"latent site {name!r} must be continuous with one support for all series, got "
                f"{type(law).__name__} with support {law.support}"
            )
        transform = biject_to(law.support)
        return cls(transform, law.event_dim, tuple(transform.inverse_shape(law.event_shape)))


class AmortizedGuide:
    """A guide for a population: a law of the shared parameters, an encoder for those of a series.

    The parameters of a series, given those that are shared, are normal on the unconstrained scale,
    with a mean and a covariance that a network makes of the series' features and the shared
    parameters. With `numpyro.plate(name, size, subsample_size=...)` in the model a step costs what
    the mini-batch costs. Paths should be integrated out (`handlers.marginalize`). Not for few
    series, where a guide with parameters for each is nearer; and an encoder that is too small or
    not trained long enough widens the law of the shared parameters: compare with NUTS on some
    hundred series (`compare_fits`).

    Args:
        model: the model; latent sites in `plate` belong to the series, all others are shared.
        plate: name of the plate of the series, its dimension the last (-1).
        features: array `(series, F)`, for all series in the plate's order: `panel_features`, or
            your own summaries, of size about 1.
        hidden: widths of the network's layers.
        shared: NumPyro's guide of the shared parameters, a function of a model.
        prefix: begins the names of the guide's parameters.

    Raises:
        ValueError: in use, a model without such a plate or latent sites in it, other plates within
            it, or features of another length.

    Source: amortised variational inference for hierarchical models, Agrawal and Domke (2021),
    "Amortized variational inference for simple hierarchical models".

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> y = jax.random.normal(jax.random.key(0), (60, 4))
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("series", 60, subsample_size=20) as i:
        ...         level = numpyro.sample("level", dist.Normal(mean, 1.0))
        ...         numpyro.sample("y", dist.Normal(level[:, None], 0.5).to_event(1), obs=y[i])
        >>> guide = nsde.guides.AmortizedGuide(model, "series", y, hidden=(8,))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 10, y, progress_bar=False)
        >>> sorted(name for name in result.params if "bias" in name)
        ['amortized_bias0', 'amortized_bias1']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        plate: str,
        features: ArrayLike,
        *,
        hidden: Sequence[int] = (64, 64),
        shared: Callable[..., Any] = AutoMultivariateNormal,
        prefix: str = "amortized",
    ) -> None:
        self.model, self.plate, self.prefix = model, plate, prefix
        self.features = jnp.asarray(features, jnp.result_type(float))
        if self.features.ndim != 2:
            raise ValueError(f"features must have shape (series, F), got {self.features.shape}")
        self.hidden, self._make_shared = tuple(hidden), shared
        self._shared: Any = None
        self._local: dict[str, _Local] = {}
        self._size = self._subsample = 0

    def _look(self, args: Any, kwargs: Any) -> None:
        """Find the sites of the series and the plate, once."""
        trace, other = (self._traced(number, args, kwargs) for number in (0, 1))
        site = trace.get(self.plate)
        if site is None or site["type"] != "plate":
            plates = [name for name, one in trace.items() if one["type"] == "plate"]
            raise ValueError(f"model has no plate {self.plate!r}; its plates are {plates}")
        self._size, self._subsample = site["args"]
        if self._size != self.features.shape[0]:
            raise ValueError(
                f"features are of {self.features.shape[0]} series, plate {self.plate!r} has "
                f"{self._size}"
            )
        hidden = [n for n, one in trace.items() if self._is_local(n, one)]
        if not hidden:
            raise ValueError(f"model has no latent site in plate {self.plate!r}")
        for name in hidden:
            # A support that moves with the shared parameters differs between two draws of them.
            first, second = (
                jax.tree_util.tree_leaves(one[name]["fn"].support) for one in (trace, other)
            )
            self._local[name] = _Local.of(
                name, trace[name]["fn"], list(zip(first, second, strict=False))
            )
        seeded = handlers.seed(self.model, jax.random.key(1))
        self._shared = self._make_shared(handlers.block(seeded, hide=hidden))

    def _traced(self, number: int, args: Any, kwargs: Any) -> Any:
        seeded = handlers.seed(self.model, jax.random.key(number))
        with handlers.block():
            return handlers.trace(seeded).get_trace(*args, **kwargs)

    def _is_local(self, name: str, site: Any) -> bool:
        if site["type"] != "sample" or site["is_observed"]:
            return False
        frames = list(site["cond_indep_stack"])
        inside = any(frame.name == self.plate for frame in frames)
        if inside and (len(frames) > 1 or frames[0].dim != -1):
            raise ValueError(
                f"latent site {name!r} is in plates {[f.name for f in frames]}: the encoder takes "
                f"sites in {self.plate!r} alone, at dimension -1"
            )
        return inside

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample all latent sites of the model, those of a mini-batch of series."""
        if self._shared is None:
            self._look(args, kwargs)
        values: dict[str, Array] = dict(self._shared(*args, **kwargs))
        context = [jnp.ravel(self._free(values[name], name)) for name in sorted(values)]
        width = sum(own.size for own in self._local.values())
        with numpyro.plate(self.plate, self._size, subsample_size=self._subsample) as index:
            shown = self.features[index]
            around = jnp.concatenate(context) if context else jnp.zeros(0, shown.dtype)
            around = jnp.broadcast_to(around[None], (shown.shape[0], around.size))
            out = self._network(jnp.concatenate([shown, around], axis=-1), width)
            law = dist.MultivariateNormal(out[:, :width], scale_tril=_factor(out[:, width:], width))
            free = numpyro.sample(f"_{self.prefix}_{self.plate}", law, infer={"is_auxiliary": True})
            start = 0
            for name, own in self._local.items():
                part = free[:, start : start + own.size].reshape(-1, *own.shape)
                start += own.size
                value = own.transform(part)
                log_det = -own.transform.log_abs_det_jacobian(part, value)
                log_det = sum_rightmost(log_det, jnp.ndim(log_det) - 1)
                values[name] = numpyro.sample(
                    name, dist.Delta(value, log_density=log_det, event_dim=own.event_dim)
                )
        return values

    def shared_draws(
        self, rng_key: PRNGKeyArray, params: Mapping[str, Any], num_draws: int
    ) -> dict[str, Array]:
        """Draws of the shared parameters from a guide that was trained.

        Args:
            rng_key: random key.
            params: as `svi.run` returns them.
            num_draws: number of draws.
        """
        if self._shared is None:
            raise ValueError("the guide has not met its model yet: train it first")
        found: dict[str, Array] = self._shared.sample_posterior(
            rng_key, dict(params), sample_shape=(num_draws,)
        )
        return found

    def _free(self, value: Array, name: str) -> Array:
        """A shared value on the unconstrained scale, as the encoder sees it."""
        site = self._shared.prototype_trace[name]
        return biject_to(site["fn"].support).inv(value)

    def _network(self, x: Array, width: int) -> Array:
        """Layers with residual tanh; the last starts near zero with a spread of one half."""
        count = width + width * (width + 1) // 2
        widths = [x.shape[-1], *self.hidden, count]
        for k, (before, after) in enumerate(itertools.pairwise(widths)):
            last = k == len(widths) - 2
            scale = 0.01 if last else 1.0

            def weights(key: Any, shape: Any = (before, after), scale: float = scale) -> Array:
                return scale * jax.random.normal(key, shape) / np.sqrt(shape[0])

            W = numpyro.param(f"{self.prefix}_weight{k}", weights)
            b = numpyro.param(f"{self.prefix}_bias{k}", jnp.zeros(after))
            y = x @ W + b[None]
            x = y if last else jnp.tanh(y)
        return x


def _factor(raw: Array, width: int) -> Array:
    """Lower triangular factors from unconstrained numbers, `(batch, width (width + 1) / 2)`."""
    diagonal = jax.nn.softplus(raw[:, :width]) + 1e-6
    rows, columns = np.tril_indices(width, -1)
    tril = jnp.zeros((raw.shape[0], width, width), raw.dtype)
    tril = tril.at[:, np.arange(width), np.arange(width)].set(diagonal)
    return tril.at[:, rows, columns].set(raw[:, width:]) if len(rows) else tril
