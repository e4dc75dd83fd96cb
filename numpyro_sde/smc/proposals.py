"""How particles move between observations, and what they know of those to come.

A proposal moves one particle over one grid step and gives the log ratio of the model's transition
to its own, both in the step's innovations; at the times where particles are resampled its
look-ahead function multiplies the weights and is divided out afterwards (a twisted, or auxiliary,
filter: Pitt and Shephard 1999; Whiteley and Lee 2014). All is written for one particle.

- `Bootstrap`: the model's own steps (Gordon, Salmond and Smith 1993).
- `Guided`: innovations given all later observations of the linearised model.
- `smc.next_observation`: those that look at the next observation alone.
- `smc.defensive`: guided steps mixed with the model's own, and what "auto" takes.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.linear.information import (
    LinearizedSteps,
    Spans,
    guided_innovations,
    log_weight,
    match_noise,
    spans,
    step_sd,
    whiten_innovations,
)
from numpyro_sde.linear.small import (
    diagonal,
    matmul,
    matvec,
    psd_factor,
    solve,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.statespace import guide as guides
from numpyro_sde.statespace.exact import (
    check_conditioning,
    condition,
    free_part,
    has_exact,
    readings,
    refuse_exact,
)
from numpyro_sde.statespace.guide import affine_step
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import believed_guide


class Plan(NamedTuple):
    """What a proposal computes once for all particles.

    Attributes:
        steps: inputs of each step, leading axis N - 1.
        nodes: inputs of the look-ahead function at each time, leading axis N.
        guide: the guide along the whole path, where there is one.
    """

    steps: Any
    nodes: Any
    guide: guides.Guide | None = None


def observed_rows(model: StateSpaceModel) -> np.ndarray:
    """Grid indices at which any instrument may have observed something, increasing."""
    rows = [np.asarray(i.rows, dtype=int) for i in model.instruments]
    return np.unique(np.concatenate([np.zeros(0, int), *rows]))


class Proposal(eqx.Module):
    """One way to move particles; subclasses say how: `Particle(proposal=MyProposal())`.

    `move` is all that is needed: the next state from standard normals `z`, and the log density of
    the model's innovations less that of the map from `z`. All other methods have defaults. Arrays
    that a proposal holds are its fields, as in any Equinox module.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> class Wide(nsde.filters.Proposal):
        ...     '''The model's own steps, with innovations of twice their standard deviation.'''
        ...     def move(self, model, step, x, memo, z):
        ...         new = nsde.filters.plain_step(model, step, x, 2.0 * z)
        ...         ratio = jnp.sum(0.5 * z**2 - 0.5 * (2.0 * z) ** 2 + jnp.log(2.0))
        ...         return new, memo, ratio
        >>> nsde.filters.Particle(100, proposal=Wide()).proposal
        Wide()
    """

    def plan(self, model: StateSpaceModel) -> Plan:
        """Compute what all particles share; refuse what is seen exactly, unless guided."""
        refuse_exact(model, type(self).__name__)
        return Plan(model.step_inputs(), None)

    def start(
        self, model: StateSpaceModel, plan: Plan, z: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """First state, of a normal law, from standard normals, and its log ratio."""
        del plan
        return model.init_mean + matvec(psd_factor(model.init_cov), z), jnp.zeros((), z.dtype)

    def enter(self, model: StateSpaceModel, node: Any, x: Float[Array, " d"]) -> Any:  # noqa: ARG002
        """What a particle carries from this observation time to the next."""
        return None

    def look_ahead(
        self, model: StateSpaceModel, node: Any, x: Float[Array, " d"]
    ) -> Float[Array, ""] | None:
        """Log of the function that weights are multiplied by when resampling; None for 1."""

    @abstractmethod
    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        """Next state, what it carries on, and the log ratio of the two laws of the step."""

    @property
    def retraced(self) -> bool:
        """Whether `ratio` can weigh a step that something else took: conditional filters ask."""
        return False

    @property
    def num_extra(self) -> int:
        """Uniform numbers that a particle needs beyond its innovations, at the end of `z`."""
        return 0

    def chosen(self, model: StateSpaceModel) -> Proposal:  # noqa: ARG002
        """The proposal to run for a model: itself, but for those that choose one by the model."""
        return self

    def level(
        self,
        ahead: Float[Array, " M"],
        log_weights: Float[Array, " M"],  # noqa: ARG002
    ) -> Float[Array, " M"]:
        """The look-ahead function of all particles as it is used."""
        return ahead

    def grid_step(self, step: Any) -> Any:
        """Time, length and cache of a step among its inputs."""
        return step[0]

    def ratio(self, model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
        """Log ratio of a step that was taken, for schemes with a square factor of the noise.

        Raises:
            NotImplementedError: the proposal is not one of conditional filters.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be retraced")

    def start_ratio(
        self,
        model: StateSpaceModel,  # noqa: ARG002
        plan: Plan,  # noqa: ARG002
        x: Float[Array, " d"],
    ) -> Float[Array, ""]:
        """Log ratio of a first state."""
        return jnp.zeros((), x.dtype)

    def path_ratios(
        self, model: StateSpaceModel, plan: Plan, path: Float[Array, "N d"]
    ) -> Float[Array, " N-1"]:
        """Log ratios of all steps of a path."""
        return jax.vmap(partial(self.ratio, model))(plan.steps, path[:-1], path[1:])


def plain_step(model: StateSpaceModel, step: Any, x: Array, z: Array) -> Array:
    """Next state by the scheme's own innovations, flat `(m,)`.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> class Plain(nsde.filters.Proposal):
        ...     '''The bootstrap filter, written anew.'''
        ...     def move(self, model, step, x, memo, z):
        ...         return nsde.filters.plain_step(model, step, x, z), memo, jnp.zeros(())
    """
    t, dt, cache = step
    state = model.to_state(x)
    shape = model.scheme.innovation_shape(model.sde, jnp.shape(state))
    new = model.scheme.step(model.sde, t, dt, state, jnp.reshape(z, shape), cache)
    return jnp.reshape(new, (model.dim,)).astype(x.dtype)


def mixed_level(
    ahead: Float[Array, " M"], log_weights: Float[Array, " M"], log_share: Any, log_rest: Any
) -> Float[Array, " M"]:
    """A look-ahead function mixed with a constant: weights are divided by it after resampling.

    However wrong it is, no particle's weight grows by more than the inverse of the share.
    """
    usable = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
    mean = jax.nn.logsumexp(ahead + usable) - jax.nn.logsumexp(usable)
    mean = jnp.where(jnp.isfinite(mean), mean, 0.0)
    return jnp.logaddexp(log_rest + ahead, log_share + mean)


class Bootstrap(Proposal):
    """The model's own steps; the observations come in by the weights alone.

    Example:
        >>> Bootstrap()
        Bootstrap()
    """

    @property
    def retraced(self) -> bool:
        return True

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        return plain_step(model, step, x, z), memo, jnp.zeros((), x.dtype)

    def grid_step(self, step: Any) -> Any:
        return step

    def ratio(self, model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
        del model, step, following
        return jnp.zeros((), x.dtype)


def step_given(
    model: StateSpaceModel, step: Any, x: Array, affine: tuple[Array, Array], z: Array, h: Any
) -> tuple[Array, Array]:
    """One step, of mean and factor `affine`, given information `H, e` about it less `base`."""
    (mean, B), (H, e, base) = affine, h
    w, log_det = guided_innovations(H, e, mean - base, B, z)
    return move_by(model, step, x, affine, w), log_weight(w, z, log_det)


def move_by(
    model: StateSpaceModel, step: Any, x: Array, affine: tuple[Array, Array], w: Array
) -> Array:
    """Next state by innovations, the step's mean and factor being known."""
    mean, B = affine
    if isinstance(model.scheme, GaussianScheme):
        return (mean + (B * w if B.ndim == 1 else matvec(B, w))).astype(x.dtype)
    return plain_step(model, step, x, w)


class WayToData(NamedTuple):
    """What leads to the next observed time, the last one of the grid counting as such.

    Attributes:
        following: index of that time after each step, `(N - 1,)`, on the host.
        from_start: from the beginning of each step, in deviations from the reference.
        from_end: from the end of each step; nothing where that is an observed time itself.
    """

    following: np.ndarray
    from_start: Spans
    from_end: Spans


def way_to_data(model: StateSpaceModel, steps: LinearizedSteps) -> WayToData:
    """Join the linearised steps from each grid time to the next observed one."""
    last = model.num_times - 1
    ends, times = np.union1d(observed_rows(model), [last]), np.arange(1, last + 1)
    is_end = np.isin(times, ends)
    from_start = spans(steps.A, steps.c, steps.B, jnp.asarray(is_end))

    def beyond(own: Array, gathered: Array) -> Array:
        ahead = jnp.concatenate([gathered[1:], gathered[-1:]])
        flag = is_end.reshape(-1, *[1] * (gathered.ndim - 1))
        return jnp.where(flag, own[None], ahead).astype(gathered.dtype)

    from_end = jax.tree.map(beyond, no_way(from_start), from_start)
    return WayToData(ends[np.searchsorted(ends, times)], from_start, from_end)


def no_way(like: Spans) -> Spans:
    """What leads from a time to itself."""
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), like)
    return zero._replace(phi=jnp.eye(zero.b.size, dtype=zero.b.dtype))


def has_unobserved(model: StateSpaceModel) -> bool:
    """Whether there are grid times, but the last, at which nothing is observed."""
    ends = np.union1d(observed_rows(model), [model.num_times - 1])
    return ends.size < model.num_times - 1


class _Towards(NamedTuple):
    """What is known of each step's end where its noise is to be matched to the particle's.

    Attributes:
        H: precision of all observations from the next observed time on, there, `(N - 1, d, d)`.
        e: information vector there, `(N - 1, d)`.
        reference: states of linearisation at the end of the step, `(N - 1, d)`.
        span: what leads from there to the observed time.
        sd: standard deviations of the step along the reference, `(N - 1, d)`.
    """

    H: Float[Array, "N-1 d d"]
    e: Float[Array, "N-1 d"]
    reference: Float[Array, "N-1 d"]
    span: Spans
    sd: Float[Array, "N-1 d"]


class Guided(Proposal):
    """Innovations of each step given all later observations of the linearised model.

    The exact discrete guided step along the mean of the extended Kalman smoother: for linear
    Gaussian models all weights are equal and one particle gives the exact likelihood. Where the
    noise depends on the state, that of the linearised model up to the next observation is scaled
    to the particle's own, so that weights stay even on fine grids.

    Example:
        >>> Guided()
        Guided()
    """

    @property
    def retraced(self) -> bool:
        return True

    def plan(self, model: StateSpaceModel) -> Plan:
        check_conditioning(model, "Particle(proposal='guided')")
        believed = believed_guide(model)
        (reference, H, e), steps = believed.guide, believed.steps
        # What the observations after each time say: its own is in the weights already.
        later = (H - steps.J, e - steps.s, reference)
        known: Any = (H[1:], e[1:], reference[1:])
        exact = None
        if has_exact(model):
            exact = jax.tree.map(lambda a: a[1:], readings(model))
        elif has_unobserved(model) and guides.noise_uses_state(model):
            way = way_to_data(model, steps)
            sd = jax.vmap(step_sd)(steps.B)
            at = way.following
            known = _Towards(H[at], e[at], reference[1:], way.from_end, sd)
        inputs = (model.step_inputs(), known, exact)
        return Plan(inputs, later, guides.Guide(reference, H, e))

    def start(
        self, model: StateSpaceModel, plan: Plan, z: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        assert plan.guide is not None
        return guides.guided_start(model, plan.guide, z)

    def look_ahead(
        self,
        model: StateSpaceModel,  # noqa: ARG002
        node: Any,
        x: Float[Array, " d"],
    ) -> Float[Array, ""] | None:
        H, e, reference = node
        ahead = x - reference
        return jnp.sum(ahead * (e - 0.5 * matvec(H, ahead)))

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        t, dt, cache = self.grid_step(step)
        mean, B = affine_step(model, t, dt, x, cache)
        known = self.information(step, B)
        if step[2] is None:
            new, ratio = step_given(model, step[0], x, (mean, B), z, known)
            return new, memo, ratio
        given = condition(mean, B, step[2])
        new, ratio = step_given(model, step[0], x, (given.mean, given.factor), z, known)
        return new, memo, ratio + given.log_density

    def information(self, step: Any, B: Array) -> tuple[Array, Array, Array]:
        """Information about a step's end where its noise has the factor B, and the state there."""
        h = step[1]
        if not isinstance(h, _Towards):
            return h
        V = match_noise(h.span.V, B, h.sd)
        known = jnp.concatenate(
            [matmul(h.H, h.span.phi), (h.e - matvec(h.H, h.span.b))[:, None]], axis=1
        )
        left = jnp.eye(V.shape[-1], dtype=V.dtype) + matmul(h.H, V)
        Z = matmul(transpose(h.span.phi), solve(left, known))
        return symmetrize(Z[:, :-1]), Z[:, -1], h.reference

    def start_ratio(self, model: StateSpaceModel, plan: Plan, x: Array) -> Array:
        if model.starts is not None:
            return jnp.zeros((), x.dtype)
        assert plan.guide is not None
        S = psd_factor(model.init_cov)
        # A pivot of zero belongs to a direction that is fixed.
        pivots = jnp.where(diagonal(S) == 0, 1.0, 0.0).astype(S.dtype)
        w = solve_lower(S + jnp.diag(pivots), (x - model.init_mean)[:, None])[:, 0]
        mean, given, seen = guides.start_given_readings(model)
        ahead = mean - plan.guide.reference[0]
        if plan.steps[2] is not None:
            w = free_part(w, condition(model.init_mean, S, readings(model).at(0)))
        z, log_det = whiten_innovations(plan.guide.H[0], plan.guide.e[0], ahead, given, w)
        return log_weight(w, z, log_det) + seen

    def ratio(self, model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
        t, dt, cache = self.grid_step(step)
        mean, B = affine_step(model, t, dt, x, cache)
        H, e, base = self.information(step, B)
        w = model.scheme.invert(
            model.sde, t, dt, model.to_state(x), model.to_state(following), cache
        )
        w, seen = jnp.reshape(w, (-1,)), jnp.zeros((), x.dtype)
        if step[2] is not None:
            given = condition(mean, B, step[2])
            mean, B, seen = given.mean, given.factor, given.log_density
            w = free_part(w, given)
        z, log_det = whiten_innovations(H, e, mean - base, B, w)
        return log_weight(w, z, log_det) + seen
