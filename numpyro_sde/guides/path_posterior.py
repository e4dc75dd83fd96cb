"""The law of one path site in one call of a guide, as a NumPyro distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import constraints

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.guides.matched import MatchedPath
from numpyro_sde.guides.natural import natural_steps
from numpyro_sde.guides.path_laws import GaussianMarkovPath, PathLaw, Sizes
from numpyro_sde.guides.path_sites import place_of, reference_from_data
from numpyro_sde.guides.score import ConditionalScorePath
from numpyro_sde.guides.starts import start_kind, start_params
from numpyro_sde.statespace.model import StateSpaceModel


class Plan(NamedTuple):
    """What set-up found out about a path site.

    Attributes:
        frames: the plates around it.
        sizes: sizes of one path.
        reference: path of linearisation of all its series, `(*lead, N, d)`; None where each call
            has to find it.
    """

    frames: tuple[Any, ...]
    sizes: Sizes
    reference: np.ndarray | None


class PathGuideLaw(dist.Distribution):
    """The law of a path under a guide; a draw brings its log density along.

    Args:
        draw: takes a key; returns a path and its log density.
        density: takes a path; returns its log density.
        lead: batch shape.
        path: the model's law, for its event shape and support.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.processes.BrownianMotion()
        >>> path = nsde.SDEPath(sde, [0.0, 1.0], dist.Normal(0.0, 1.0))
        >>> law = nsde.guides.PathGuideLaw(
        ...     lambda key: (jnp.zeros(2), jnp.array(0.5)), lambda x: jnp.array(0.5), (), path)
        >>> x, [log_prob] = law.sample_with_intermediates(jax.random.key(0))
        >>> x.shape, float(law.log_prob(x, [log_prob]))
        ((2,), 0.5)
    """

    pytree_aux_fields = ("path",)

    def __init__(
        self,
        draw: Callable[[PRNGKeyArray], tuple[Array, Array]],
        density: Callable[[Array], Array],
        lead: tuple[int, ...],
        path: AbstractPathLaw,
    ) -> None:
        self._draw, self._density, self.path = draw, density, path
        super().__init__(lead, path.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return self.path.support

    @property
    def has_rsample(self) -> bool:
        return True

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Array]]:
        if sample_shape:
            keys = jax.random.split(key, int(np.prod(sample_shape)))
            drawn = jax.vmap(self._draw)(keys)
            value, log_q = (jnp.reshape(a, sample_shape + a.shape[1:]) for a in drawn)
        else:
            value, log_q = self._draw(key)
        remember_value(value, self.path.clock)
        return value, [log_q]

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        if intermediates:
            return intermediates[0]
        return self._density(jnp.asarray(value))


class PathPosterior:
    """A path's law under a guide in one call; its parameters are registered on construction.

    Args:
        law: the family.
        name: the path's site.
        prefix: the guide's prefix.
        gradient: how draws hand gradients on, see `AutoPathGuide`.
        site: the path and its data in this call.
        plan: from set-up.
        plates: the open plates by name.
        theta: shared parameters for networks, centred.
    """

    def __init__(
        self,
        law: PathLaw,
        name: str,
        prefix: str,
        gradient: str,
        site: ObservedPath,
        plan: Plan,
        plates: Mapping[str, Any],
        theta: Float[Array, " theta"],
    ) -> None:
        self.family, self.site, self.plan, self.theta = law, site, plan, theta
        self._plates, self._gradient = plates, gradient
        path, sizes, prefix = site.path, plan.sizes, f"{name}_{prefix}"
        self._prefix = prefix
        if path.num_times - 1 != sizes.num_steps:
            raise ValueError(
                f"AutoPathGuide: path {name!r} has {path.num_times} times, but had "
                f"{sizes.num_steps + 1} in the guide's first call"
            )
        self.kind = start_kind(path)
        self.shared = law.shared_params(prefix, sizes)
        full = self._full_lead()
        # Parameters of one series each; an amortised law has one start for all.
        own: dict[str, tuple[Array, int]] = {}
        self.start: Any = None
        if self.kind != "fixed" and law.amortized and not law.owns_start:
            self.start = start_params(prefix, sizes.num_free, ())
        with self.plates():
            if self.kind != "fixed" and not law.amortized and not law.owns_start:
                first = start_params(prefix, sizes.num_free, full)
                own |= {"start_shift": (first["shift"], 1), "start_factor": (first["factor"], 2)}
            dims = law.local_dims()
            for key, value in law.local_params(prefix, sizes, full).items():
                own[key] = (value, dims[key])
        if plan.reference is not None:
            own["reference"] = (self._of_these_series(plan.reference), 2)
        self._own = own

    @contextmanager
    def plates(self) -> Iterator[None]:
        """The plates around the site."""
        with ExitStack() as stack:
            for frame in self.plan.frames:
                stack.enter_context(self._plates[frame.name])
            yield

    @property
    def plates_around(self) -> list[Any]:
        """The open plates around the site."""
        return [self._plates[frame.name] for frame in self.plan.frames]

    @property
    def share(self) -> float:
        """How many series each of this call stands for: sizes of plates over their subsamples'."""
        return math.prod(p.size / p.subsample_size for p in self.plates_around)

    def _full_lead(self) -> tuple[int, ...]:
        full = list(self.site.lead)
        for frame in self.plan.frames:
            full[frame.dim] = self._plates[frame.name].size
        return tuple(full)

    def _of_these_series(self, reference: np.ndarray) -> Any:
        value: Any = reference
        for frame in self.plan.frames:
            plate = self._plates[frame.name]
            if plate.size != plate.subsample_size:
                value = jnp.take(jnp.asarray(value), plate._indices, axis=frame.dim - 2)
        return value

    def law(self) -> dist.Distribution:
        """The law as a distribution over the path."""
        law: dist.Distribution = PathGuideLaw(
            self._draw, self._density, self.site.lead, self.site.path
        )
        return law if self.site.mask is True else law.mask(self.site.mask)

    def map(
        self,
        action: Callable[..., Any],
        arrays: tuple[Any, ...] = (),
        dims: tuple[int, ...] = (),
    ) -> Any:
        """Map `action(model, place, start, local, *arrays)` of one path over all of them."""
        names = list(self._own)
        count = len(arrays)

        def one(model: StateSpaceModel, *flat: Array) -> Any:
            local = dict(zip(names, flat[count:], strict=True))
            start = self.start
            if "start_shift" in local:
                start = {key: local.pop(f"start_{key}") for key in ("shift", "factor")}
            reference = local.pop("reference", None)
            if reference is None:
                reference = reference_from_data(model)
            reference = jnp.asarray(reference, jnp.result_type(float))
            place = place_of(model, reference, self.theta, self.kind)
            law = self.family.start(self.site.path.init, model, place, start, self.shared, local)
            return action(model, place, law, local, *flat[:count])

        own, every = tuple(self._own.values()), (*dims, *(dim for _, dim in self._own.values()))
        site = self.site

        # As one compiled function: a call outside `jit` would else compile every operation apart.
        @jax.jit
        def run(*flat: Array) -> Any:
            return site.map(one, flat, every)

        return run(*arrays, *(value for value, _ in own))

    def residual(
        self, law: ConditionalScorePath, value: Array, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """Mean residual of the backward equation over all series, around their paths."""
        path, lead = self.site.path, self.site.lead
        keys = jax.random.split(key, lead)

        def one(
            model: Any, place: Any, start: Any, local: Any, value: Array, key: PRNGKeyArray
        ) -> Array:
            del start, local
            return law.residual(model, place, self.shared, value, key)

        return jnp.mean(self.map(one, (value, keys), (path.event_dim, 0)))

    def natural(
        self, law: GaussianMarkovPath, num_steps: int
    ) -> tuple[dict[str, Array], Float[Array, " steps"]]:
        """Parameters of all series after natural-gradient steps, and their bounds before each."""
        dims = law.local_dims()
        part = [plate.name for plate in self.plates_around if plate.size != plate.subsample_size]
        if part:
            raise ValueError(
                f"natural-gradient steps need all series, and plates {part} are subsampled: train "
                "this guide by SVI"
            )

        def one(model: Any, place: Any, start: Any, local: Any) -> Any:
            own = {key: local[key] for key in dims}
            return natural_steps(law, model, place, start, own, num_steps)

        new, first, bounds = self.map(one)
        found = {**new, **{f"start_{key}": value for key, value in first.items()}}
        values = {f"{self._prefix}_{key}": value for key, value in found.items()}
        return values, jnp.sum(bounds, axis=tuple(range(bounds.ndim - 1)))

    def bound(self, law: MatchedPath, key: PRNGKeyArray, num_times: int) -> Float[Array, ""]:
        """The bound of all series, without simulating them."""
        keys = jax.random.split(key, self.site.lead)

        def one(
            model: Any, place: Any, start: Any, local: Any, key: PRNGKeyArray
        ) -> tuple[Array, Array, Array]:
            del start
            first, weights, bound = law.bound(model, place, self.shared, local, key, num_times)
            return model.visible(first), weights, bound

        first, weights, bound = self.map(one, (keys,), (0,))
        if self.kind != "fixed":
            axis = len(self.site.lead)
            log_p = self.site.path.init.log_prob(jnp.moveaxis(first, axis, 0))
            bound = bound + jnp.sum(jnp.moveaxis(log_p, 0, axis) * weights, -1)
        return self.share * jnp.sum(bound)

    def _draw(self, key: PRNGKeyArray) -> tuple[Array, Array]:
        key_start, key_path = jax.random.split(key)
        path, lead, real = self.site.path, self.site.lead, jnp.result_type(float)
        z0 = jax.random.normal(key_start, (*lead, self.plan.sizes.num_free), real)
        z = jax.random.normal(key_path, lead + path.innovation_shape, real)

        def one(model: Any, place: Any, start: Any, local: Any, z0: Array, z: Array) -> Any:
            x0, log_start = start.draw(z0)
            drawn, log_q = self.family.draw(model, place, self.shared, local, x0, z)
            if self._gradient == "path":
                return drawn, log_start + log_q
            # With the law's parameters held, gradients pass through the path alone.
            shared, local = lax.stop_gradient((self.shared, local))
            log_start = start.held().log_prob(jnp.ravel(drawn[0]), z0)
            return drawn, log_start + self.family.log_prob(model, place, shared, local, drawn, z)

        return self.map(one, (z0, z), (1, len(path.innovation_shape)))

    def _density(self, value: Array) -> Array:
        path, lead = self.site.path, self.site.lead
        extra = jnp.shape(value)[: jnp.ndim(value) - path.event_dim]
        if extra != lead:  # draws in front
            value = jnp.broadcast_to(value, jnp.broadcast_shapes(extra, lead) + path.event_shape)
            front = value.shape[: value.ndim - path.event_dim - len(lead)]
            flat = jnp.reshape(value, (-1, *lead, *path.event_shape))
            return jnp.reshape(jax.vmap(self._density)(flat), front + lead)

        def one(model: Any, place: Any, start: Any, local: Any, value: Array) -> Any:
            log_start = start.log_prob(jnp.ravel(value[0]))
            return log_start + self.family.log_prob(model, place, self.shared, local, value)

        return self.map(one, (value,), (path.event_dim,))
