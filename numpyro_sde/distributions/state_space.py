"""A path law and what is said of it, as the state-space model that filters take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.distributions.moments import is_flat, is_gaussian, start_moments
from numpyro_sde.distributions.parts import as_constant
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.projection import path_for
from numpyro_sde.distributions.statement import Statement
from numpyro_sde.schemes import LocalLinear
from numpyro_sde.schemes.fractional_linear import markovian_sde
from numpyro_sde.schemes.memory import MemoryScheme, noise_of, num_states
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.statespace.checks import typed_key
from numpyro_sde.statespace.exact import (
    has_exact,
    refuse_contradiction,
    without_known_start,
)
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, Instrument, StateSpaceModel
from numpyro_sde.statespace.updates import covariance_uses_state


class Readings(eqx.Module):
    """Data of a statement as an argument of a program, and what the host knows of their gaps.

    Attributes:
        values: the data, `(*lead, *replicates, K, *observation)`.
        present: where the data of each path are not missing, `(*replicates, K, *observation)`; a
            host array. None where that is not known before tracing, or not the same for all.
    """

    values: Array
    present: np.ndarray | None

    @classmethod
    def of(cls, statement: Statement, y: Any, *, gaps: bool = True) -> Readings:
        """The data of a statement; without `gaps`, only that there are none is taken as known."""
        known = isinstance(y, np.ndarray) and y.dtype.kind in "fiub"
        present = None
        if known:
            found = ~np.isnan(y)
            one = found.ndim == len(statement.event_shape)
            if found.all() or (one and gaps):
                present = np.ones(statement.event_shape, bool) if found.all() else found
        return cls(y if isinstance(y, jax.core.Tracer) else as_constant(y), present)

    def mark(self, path: AbstractPathLaw, statement: Statement, times: Any, found: Any) -> Any:
        """Instruments with what is missing as the host knows it: filters then see it."""
        if self.present is None:
            return found
        blank: Any = np.where(self.present, 0.0, np.nan)
        known = path.instruments(statement, times, blank)
        pairs = zip(found, known, strict=True)
        return [one._replace(present=same.present) for one, same in pairs]


class ObservedPath(eqx.Module):
    """A path and all that is said of it: what every engine that treats paths by states takes.

    Attributes:
        path: its law.
        lead: batch shape around it, plates included.
        data: the statements that observe it, with their data `(*lead, *replicates, K, *obs)`, or
            `Readings` of them.
        name: its site, for messages.
        mask: True, or where its density counts.
    """

    path: AbstractPathLaw
    lead: tuple[int, ...] = eqx.field(static=True)
    data: tuple[tuple[Statement, Any], ...] = ()
    name: str = eqx.field(static=True, default="x")
    mask: Any = True

    @property
    def has_data(self) -> bool:
        """Whether anything is observed of it."""
        return bool(self.data)

    def map(
        self,
        fn: Callable[..., Any],
        arrays: tuple[Any, ...] = (),
        dims: tuple[int, ...] = (),
        at: Any = None,
        num_bytes: int | None = None,
    ) -> Any:
        """Map `fn(model, *arrays)` of the unbatched state-space model over the batch.

        Args:
            fn: function of the model of one path.
            arrays: further arguments, leading dimensions the batch.
            dims: event dimensions of each.
            at: indices of the one element to treat; None for all.
            num_bytes: what `fn` needs for one element, roughly, so that a long batch is treated
                in parts; None for all at once.
        """
        path = self.path
        kind = path.start_kind
        mean, cov = start_moments(path.init, len(path.state_shape), kind)
        # A start given in whole numbers is a real state all the same.
        mean, cov = (
            mean.astype(jnp.result_type(mean, float)),
            cov.astype(jnp.result_type(cov, float)),
        )
        state_shape, chosen = path.state_shape, path.scheme_chosen
        flat: list[Any] = []
        flat_dims: list[Any] = []
        for statement, y in self.data:
            flat += [statement, y.values if isinstance(y, Readings) else y]
            flat_dims += [statement.leaf_event_dims(), len(statement.event_shape)]

        def one(
            sde: Any,
            scheme: Any,
            times: Any,
            dt: Any,
            cache: Any,
            mean: Array,
            cov: Array,
            *rest: Any,
        ) -> Any:
            observed, others = rest[: len(flat)], rest[len(flat) :]
            instruments: list[Instrument] = []
            for statement, y, (_, given) in zip(
                observed[::2], observed[1::2], self.data, strict=True
            ):
                laid_out = path.instruments(statement, times, y)
                if isinstance(given, Readings):
                    laid_out = given.mark(path, statement, times, laid_out)
                instruments += laid_out
            model = StateSpaceModel(
                sde=sde,
                scheme=scheme,
                scheme_chosen=chosen,
                times=times,
                dt=dt,
                cache=cache,
                init_mean=mean,
                init_cov=cov,
                init_gaussian=kind == "normal",
                init_kind=kind,
                scalar=state_shape == (),
                instruments=tuple(instruments),
            )
            if has_exact(model):
                refuse_contradiction(model)
                model = without_known_start(model)
            return fn(with_memory(model, state_shape), *others)

        every = (1, 2, *flat_dims, *dims)
        return path._map(one, self.lead, (mean, cov, *flat, *arrays), every, at, num_bytes)

    def run(
        self, method: AbstractFilter, fn: Callable[[AbstractFilter, StateSpaceModel], Any]
    ) -> Any:
        """Map `fn(method, model)` over the batch, each element with random numbers of its own."""
        observed = self.treated_by(method)
        key = method.random_key

        def checked(method: AbstractFilter, model: StateSpaceModel) -> Any:
            method.check(model)
            check_powers(method, model)
            return with_missing_terms(method, model, fn(method, model))

        if key is None:
            return observed.map(
                lambda model: checked(method, model), num_bytes=observed.bytes_of_one()
            )

        def seeded(model: StateSpaceModel, key: PRNGKeyArray) -> Any:
            return checked(method.with_key(key), model)

        return observed.map_seeded(seeded, key, method.num_starts)

    def bytes_of_one(self) -> int:
        """Memory of a filter's gradient over one element of the batch, roughly.

        For each time some ten matrices of the state's size, and as many vectors of it for each
        number observed.
        """
        size = max(1, math.prod(self.path.state_shape))
        seen = sum(math.prod(statement.event_shape) for statement, _ in self.data)
        times = self.path.num_times
        width = np.dtype(jnp.result_type(float)).itemsize
        return 10 * width * (times * size * (size + 1) + seen * (size + 1))

    def treated_by(self, method: AbstractFilter) -> ObservedPath:
        """The same with the path as a method takes it."""
        path = path_for(method, self.path)
        return ObservedPath(path, self.lead, self.data, self.name, self.mask)

    def map_seeded(
        self,
        fn: Callable[..., Any],
        key: PRNGKeyArray,
        num_starts: int,
        arrays: tuple[Any, ...] = (),
        dims: tuple[int, ...] = (),
    ) -> Any:
        """Map `fn(model, key, *arrays)`, each element with a key and starts of its own."""
        lead, path = self.lead, self.path
        key = typed_key(key)
        # Split before use: a child made by `fold_in` may be one that `split` makes.
        start_key, own = jax.random.split(key) if key.ndim == 0 else (key[0], key)
        starts = draw_starts(path, lead, num_starts, start_key)
        keys = _keys_for(own, lead)
        count = len(arrays)

        def seeded(model: StateSpaceModel, key: PRNGKeyArray, *rest: Any) -> Any:
            return fn(with_starts(model, *rest[count:]), key, *rest[:count])

        start_dims = tuple(1 + len(path.state_shape) for _ in starts)
        every = (keys.ndim - len(lead), *dims, *start_dims)
        return self.map(seeded, (keys, *arrays, *starts), every)


def data_under_law(mask: Any, statement: Statement, y: Any, name: str) -> Any:
    """The data of a statement, refused where the law of its path is masked out and they are not.

    Nothing can be drawn or integrated there. A mask that is known only inside a trace refuses when
    the compiled program runs.

    Raises:
        ValueError: where it is known before tracing.
    """
    if mask is True:
        return y
    known = not any(isinstance(a, jax.core.Tracer) for a in (mask, y))
    xp: Any = np if known else jnp
    floats = xp.asarray(y, jnp.result_type(float))
    missing = xp.all(xp.isnan(floats), axis=tuple(range(-len(statement.event_shape), 0)))
    alone = xp.any(~(xp.asarray(mask) | missing))
    message = (
        f"path {name!r} is masked out by handlers.mask where its data are not: without a law "
        "it cannot be integrated out, or drawn. Mask the observe statements alone"
    )
    if not known:
        return eqx.error_if(jnp.asarray(y), alone, message)
    if alone:
        raise ValueError(message)
    return y


def check_powers(method: AbstractFilter, model: StateSpaceModel) -> None:
    """Raise where a method cannot take a power of a likelihood (`handlers.scale`).

    Raises:
        ValueError: a normal emission whose covariance depends on the state, or moments asked of
            the power of another law.
    """
    name = type(method).__name__
    for instrument in model.instruments:
        if not instrument.powered or method.weighs_by_density:
            continue
        inputs = jax.tree.map(lambda a: a[0], instrument.inputs)
        if instrument.gaussian and covariance_uses_state(instrument, inputs, model.init_mean):
            raise ValueError(
                f"{name} cannot take handlers.scale around an observe statement whose variance "
                "depends on the state: the power of such a normal density is not normal. Use "
                "Particle(), or leave the path latent"
            )
        if not instrument.gaussian and getattr(method, "emission", "moments") == "moments":
            raise ValueError(
                f"{name} cannot take handlers.scale around an observe statement by the moments of "
                "its emission: use emission='laplace' or Particle(), or leave the path latent"
            )


def with_missing_terms(method: AbstractFilter, model: StateSpaceModel, result: Any) -> Any:
    """Add to a log likelihood, or its increments, what it lacks.

    That is what powers of normal emissions have, and what is read of a start that is known.
    """
    scales = [i.log_scale(model.init_mean) for i in model.instruments if i.log_scale is not None]
    lacking = [] if method.weighs_by_density else scales
    if model.start_agrees is not None:
        lacking = [*lacking, jnp.zeros(model.num_times).at[0].set(model.start_agrees)]
    if not lacking:
        return result
    terms = sum(lacking[1:], lacking[0])
    if isinstance(result, FilterResult):
        return eqx.tree_at(
            lambda r: (r.increments, r.log_likelihood),
            result,
            (result.increments + terms, result.log_likelihood + jnp.sum(terms)),
        )
    return result + (terms if jnp.ndim(result) else jnp.sum(terms))


def _keys_for(key: PRNGKeyArray, lead: tuple[int, ...]) -> PRNGKeyArray:
    """Independent keys `(*lead, ...)`, made of one key or of each of several."""
    if key.ndim == 0:
        return jax.random.split(key, lead)
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, lead))(key), 0, -1)


def draw_starts(
    path: AbstractPathLaw, lead: tuple[int, ...], num_starts: int, key: PRNGKeyArray
) -> tuple[Array, ...]:
    """Draws of first states that are not normal, one array `(*lead, M, *state)`, or none."""
    if num_starts == 0 or is_gaussian(path.init):
        return ()
    if is_flat(path.init):
        raise ValueError(
            "init is flat (ImproperUniform), which cannot be drawn from: particles need a proper "
            "law of the first state. filters.Kalman() takes a flat one exactly"
        )
    draws = path.init.expand(lead).sample(key, (num_starts,))
    return (jnp.moveaxis(draws, 0, len(lead)).astype(jnp.result_type(float)),)


def with_starts(model: StateSpaceModel, *starts: Array) -> StateSpaceModel:
    """Give a model the draws that `draw_starts` made."""
    if not starts:
        return model
    states = jnp.reshape(starts[0], (starts[0].shape[0], -1))
    # A noise with memory starts with a bank of mean zero; a regime not drawn yet is -1.
    memory = model.dim - states.shape[1]
    hidden = -1.0 if isinstance(model.scheme, SwitchingSteps) else 0.0
    return model._replace(starts=jnp.pad(states, ((0, 0), (0, memory)), constant_values=hidden))


def with_memory(model: StateSpaceModel, state_shape: tuple[int, ...]) -> StateSpaceModel:
    """The model with all that its scheme carries; the same where the noise has no memory."""
    scheme = model.scheme
    if isinstance(scheme, SwitchingSteps):  # no regime has been drawn yet
        return model._replace(
            init_mean=jnp.append(model.init_mean, -1.0),
            init_cov=jnp.pad(model.init_cov, ((0, 1), (0, 1))),
            scalar=False,
            state_shape=state_shape,
        )
    if not isinstance(scheme, MemoryScheme):
        return model
    count, size = scheme.num_noises(model.sde), num_states(model.sde)

    def extend(cov: Array) -> tuple[Array, Array]:
        mean = jnp.concatenate([model.init_mean, jnp.zeros(cov.shape[0], cov.dtype)])
        return mean, jax.scipy.linalg.block_diag(model.init_cov, cov)

    markovian = None
    if not noise_of(model.sde).varies:
        bank = noise_of(model.sde).bank(model.dt.sum(), model.dt.min())
        start_mean, start_cov = extend(jnp.kron(jnp.eye(count), bank.start))
        markovian = model._replace(
            sde=markovian_sde(model.sde, state_shape, bank),
            scheme=LocalLinear(),
            cache=None,
            init_mean=start_mean,
            init_cov=start_cov,
            scalar=False,
            state_shape=state_shape,
        )
    mean, cov = extend(jnp.zeros((count * size, count * size), model.init_cov.dtype))
    return model._replace(
        init_mean=mean, init_cov=cov, scalar=False, state_shape=state_shape, markovian=markovian
    )
