"""The guided path: whitened under its law given the observations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from jaxtyping import Array, ArrayLike, Float
from numpyro.infer.reparam import Reparam

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.moments import is_gaussian, mean_and_cov
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import Statement
from numpyro_sde.linear.information import log_weight
from numpyro_sde.linear.small import matvec, psd_factor
from numpyro_sde.models.reading import read_model
from numpyro_sde.models.stack import (
    Run,
    enclosing_run,
    outside_all_handlers,
    outside_all_meshes,
)
from numpyro_sde.reparam.path import (
    Unwrapped,
    is_innovation,
    latent,
    leave_alone,
    unwrap,
)
from numpyro_sde.reparam.planning import (
    Arguments,
    Found,
    Guiding,
    Plan,
    Program,
    compile_program,
    is_collected,
    note,
    search,
)
from numpyro_sde.reparam.strength import present_pull
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.statespace.checks import check_count
from numpyro_sde.statespace.exact import check_conditioning
from numpyro_sde.statespace.guide import (
    Guide,
    guided_innovations_along,
    guided_path,
    guided_start,
    make_guide,
    restarted,
    retraced,
)
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import believed_guide, data_reference, seen_reference

Reference = Literal["smoother", "data"]

# Data sets, and models, whose plans are kept.
_MAX_PLANS = 4


class GuidedReparam(Reparam):
    """The path as a map of standard normals that heads for the observations.

    Each step's innovations are drawn given what the observations still to come say of it, in the
    SDE linearised along a reference path (`nsde.filters.guide`). Latent sites are
    `{name}_innov`, standard normal, and for a start that is not fixed `{name}_init_innov` (a
    normal one) or `{name}_init`. The factor `{name}_guide` carries the exact ratio of the path's
    law to the guided one, so the posterior is that of the model whatever the guide; a good guide
    makes it close to standard normal. In a linear-Gaussian model it is standard normal.
    `nsde.infer.SplitNUTS` is the NUTS that makes the most of that.

    It sees the observations that `nsde.observe` makes of the path, those that `condition` adds
    included. A prior draw of such a model with data is a draw of the guide, not of the prior.
    Not for posteriors with several modes of the path (bimodal bridges): the guide goes through
    one of them, the others are lost in its tails; `nsde.diagnostics.guide_quality` warns of it.

    Args:
        reference: path of linearisation: "smoother", the mean of the extended Kalman smoother;
            "data", interpolated observations; or the states themselves, shape
            `(*batch, T, *state)`.
        at: values of the model's sites at which the reference path (and a frozen guide) is
            computed; None searches for the posterior mode along the guided path, once for
            each data set. Not used where data are only known inside a trace: the reference is
            then that of the current parameters, which costs more.
        frozen: keep the guide at these values too, instead of following the parameters: a
            cheaper gradient, a guide that fits less far from them.
        follow: how often the reference moves with the parameters too, in each gradient: the guide
            is made again along the path that its last version heads for, a step of Newton's. For
            emissions that are not normal where parameters move level or size of the whole path
            (gains and levels of many counts on one path): the innovations then stay near standard
            normal. Each move costs as much as the rest of the gradient; 0 for none.

    Raises:
        TypeError: the site is no `SDEPath`, or its scheme is no map of Gaussian innovations; a
            `follow` that is no integer.
        ValueError: an unknown reference; a reference that does not fit the path; a path that is
            observed or conditioned on; a handler that wraps no model; `frozen` and `follow` both.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
        >>> run = numpyro.handlers.trace(numpyro.handlers.seed(guided, 0))
        >>> sites = run.get_trace(np.array([0.5, 0.1, np.nan, 0.3]))
        >>> [name for name in sites]
        ['scale', 'x_init_innov', 'x_innov', 'x_guide', 'x', 'y']
        >>> bool(abs(sites["x"]["value"][0] - 0.5) < 0.5)
        True
    """

    def __init__(
        self,
        reference: Reference | ArrayLike = "smoother",
        *,
        at: Mapping[str, ArrayLike] | None = None,
        frozen: bool = False,
        follow: int = 0,
    ) -> None:
        if isinstance(reference, str) and reference not in get_args(Reference):
            raise ValueError(
                f"reference must be 'smoother', 'data' or an array of states, got {reference!r}"
            )
        if at is not None and not isinstance(at, Mapping):
            raise TypeError(f"at must map names of sites to values, got {type(at).__name__}")
        check_count("follow", follow, least=0)
        if frozen and follow:
            raise ValueError(
                f"frozen=True keeps the guide where it is and follow={follow} moves it with the "
                "parameters: give one of them"
            )
        self.reference = reference
        self.at = None if at is None else dict(at)
        self.frozen, self.follow = frozen, follow
        self._plans: list[tuple[Any, bytes, Found]] = []
        self._programs: list[tuple[Any, Program]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": [], "_programs": []}

    def refreshed(self, name: str, samples: Mapping[str, ArrayLike]) -> GuidedReparam:
        """The same guide along the mean of posterior draws, at their mean parameters.

        For after a warm-up: run a few hundred draws, refresh, and start the long run. `SplitNUTS`
        then has the curvature at these parameters as its first metric: that at the mode is far
        from it where many effects share a spread that is estimated too.

        Args:
            name: the path's site.
            samples: draws of the model's sites and of the path, leading axis the draws
                (`mcmc.get_samples()`).

        Raises:
            ValueError: no draws of the path.
        """
        if name not in samples:
            raise ValueError(f"samples must hold draws of {name!r}, got {sorted(samples)}")
        at = {
            site: np.mean(np.asarray(value), axis=0)
            for site, value in samples.items()
            if site != name and not is_innovation(site) and not site.endswith("_guide")
        }
        reference = np.mean(np.asarray(samples[name]), axis=0)
        return GuidedReparam(reference, at=at, frozen=self.frozen, follow=self.follow)

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        if leave_alone(name, obs, self):
            return fn, obs
        site = unwrap(name, fn, self)
        run = enclosing_run(sys._getframe(1), name, type(self).__name__)
        data = look_ahead(name, run)
        if not data:
            return None, _guided_site(name, site, [], None, None)[0]
        plan = None
        # States that the user gave are the reference as they are; with values of the sites the
        # curvature there is still to be found.
        searched = self.frozen or isinstance(self.reference, str) or self.at is not None
        if searched and run.is_concrete and _is_concrete(site.path, data):
            found = self._search(run, data)
            if found is not None:
                plan = found.plans.get(name)
                note(found)
        if plan is None:
            given = self._given(name, site)
            return None, _guided_site(name, site, data, given, None, self.follow)[0]
        if is_collected():
            return None, _along_reference(name, site, plan.reference)
        guide = plan if self.frozen else None
        return None, _guided_site(name, site, data, plan.reference, guide, self.follow)[0]

    def _given(self, name: str, site: Unwrapped) -> Any:
        """The reference as an array `(*lead, N, d)`, or how to find it."""
        if isinstance(self.reference, str):
            return self.reference
        path = site.path
        states = jnp.asarray(self.reference, jnp.result_type(float))
        wanted = site.lead + path.event_shape
        try:
            states = jnp.broadcast_to(states, wanted)
        except ValueError:
            raise ValueError(
                f"GuidedReparam: reference has shape {states.shape}, but path {name!r} has shape "
                f"{wanted}"
            ) from None
        return jnp.reshape(states, (*site.lead, path.num_times, -1))

    def _search(self, run: Run, data: list[tuple[Statement, Array]]) -> Found | None:
        """Find the plug-in parameters and the reference paths, once for each data set."""
        key = run.digest()
        for fn, known, found in self._plans:
            if fn is run.fn and known == key:
                return found
        with outside_all_handlers(), outside_all_meshes():
            arguments = Arguments(run, [y for _, y in data])
            for chosen in (arguments, arguments.all_static()):
                try:
                    program = self._program(run, chosen)
                except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError):
                    # The model asks for the numbers of its data, or closes over traced values:
                    # then nothing is known beforehand.
                    continue
                found = search(program, chosen.data)
                for user in program.users:
                    user._plans = [*user._plans[1 - _MAX_PLANS :], (run.fn, key, found)]
                return found
        return None

    def _program(self, run: Run, arguments: Arguments) -> Program:
        """The compiled density, once for a model and the shapes of its data."""
        key = arguments.key()
        for fn, program in self._programs:
            if fn is run.fn and program.key == key:
                return program
        program = compile_program(run, arguments, _GUIDING)
        for user in program.users:
            user._programs = [*user._programs[1 - _MAX_PLANS :], (run.fn, program)]
        return program


def _is_concrete(path: SDEPath, data: list[tuple[Statement, Array]]) -> bool:
    values = [path.times, *(y for _, y in data)]
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def look_ahead(name: str, run: Run) -> list[tuple[Statement, Array]]:
    """Observation statements of a path, with their data, in a run of the model."""
    # With emissions' parameters that the model draws after the path: the guide needs them.
    reading = read_model(run.looking_ahead(), run.args, run.kwargs, known=run.known, only=name)
    observed = reading.observed.get(name)
    return [] if observed is None else list(observed.data)


def _guided_site(
    name: str,
    site: Unwrapped,
    data: list[tuple[Statement, Array]],
    reference: Any,
    frozen: Plan | None,
    follow: int = 0,
) -> tuple[Array, Any]:
    """Make the auxiliary sites and the factor of a path; give it, the guide and the states used."""
    path = site.path
    start, normal = _start_sites(name, site)
    z = latent(f"{name}_innov", path.init, site, path.innovation_shape)
    dims: tuple[int, ...] = (len(path.state_shape), len(path.innovation_shape))
    if not data:
        value = path.forward(_prior_start(path, start) if normal else start, z)
        remember_value(value, path.clock, mask=site.mask)
        return value, None
    arrays: tuple[Any, ...] = (start, z)
    if not isinstance(reference, str):
        arrays, dims = (*arrays, jnp.asarray(reference)), (*dims, 2)
    if frozen is not None:
        guide_arrays = (jnp.asarray(frozen.H), jnp.asarray(frozen.e))
        arrays, dims = (*arrays, *guide_arrays), (*dims, 3, 2)

    known = [(statement, jnp.asarray(y)) for statement, y in data]
    kind = "frozen" if frozen is not None else reference if isinstance(reference, str) else "along"
    pull = present_pull()
    if pull is not None:
        strengths = (jnp.asarray(s, z.dtype) for s in (pull.strength, pull.to))
        arrays = (*arrays, *(jnp.broadcast_to(s, site.lead) for s in strengths))
        dims = (*dims, 0, 0)
    value, log_weight, guide, states, moved = _guided_states(
        path, site.lead, known, arrays, dims, kind, normal, pull is not None, follow
    )
    if pull is not None:
        mask = True if site.mask is None else site.mask
        pull.log_weights.append(jnp.sum(jnp.where(mask, log_weight, 0.0)))
        pull.largest.append(jnp.max(moved[2], initial=0.0))
        pull.moved[f"{name}_innov"] = jnp.reshape(moved[1], jnp.shape(z))
        if normal:
            pull.moved[f"{name}_init_innov"] = jnp.reshape(moved[0], jnp.shape(start))
    with numpyro.handlers.mask(mask=site.mask):
        numpyro.factor(f"{name}_guide", log_weight)
    remember_value(value, path.clock, mask=site.mask)
    return value, (guide, states)


@entry_point
def _guided_states(
    path: SDEPath,
    lead: tuple[int, ...],
    data: list[tuple[Statement, Array]],
    arrays: tuple[Any, ...],
    dims: tuple[int, ...],
    kind: str,
    normal: bool,
    pulled: bool,
    follow: int,
) -> tuple[Array, Array, Guide, Array, Any]:
    """The path, its log weight, the guide, and the states that were drawn.

    Where guides are `pulled`, the last two arrays are strengths, and the normals of the same path
    under a guide of the second come last, with the largest innovation.
    """

    def one(model: StateSpaceModel, start: Array, z: Array, *given: Array) -> Any:
        check_conditioning(model, "GuidedReparam")
        strengths: tuple[Array, ...] = ()
        if pulled:
            given, strengths = given[:-2], given[-2:]
        if kind == "frozen":
            guide = Guide(*(jnp.asarray(a, z.dtype) for a in given))
        elif kind == "along":
            guide = make_guide(model, carried(model, jnp.asarray(given[0], z.dtype)))
        elif kind == "smoother":
            guide = believed_guide(model).guide
        else:
            guide = make_guide(model, data_reference(model))
        for _ in range(follow):
            guide = make_guide(model, _central_path(model, guide, start, z, normal))
        pulls = [guide._replace(H=s * guide.H, e=s * guide.e) for s in strengths]
        guide = pulls[0] if pulls else guide
        filled = _filled(model, start)
        if normal:
            x0, weight = guided_start(model, guide, filled)
        else:
            x0, weight = filled, jnp.zeros((), z.dtype)
        if not pulls:
            states, more = guided_path(model, guide, x0, z)
            return model.visible(states), weight + more, guide, states, None
        states, more, moved = _pulled_path(model, (pulls[0], pulls[1]), x0, z)
        size = model.visible_size
        again = restarted(model, pulls[0], pulls[1], filled)[:size] if normal else start
        return model.visible(states), weight + more, guide, states, (again, *moved)

    return ObservedPath(path, lead, tuple(data)).map(one, arrays, dims)


def _pulled_path(
    model: StateSpaceModel, guides: tuple[Guide, Guide], x0: Array, z: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """A path and its log weight under one guide, its normals under another.

    The largest innovation of the model along it comes last.
    """
    if model.num_times == 1:
        none = jnp.zeros((), x0.dtype)
        return x0[None], none, (z, none)
    states, w, log_det = guided_innovations_along(model, guides[0], x0, z)
    weight = jnp.sum(log_weight(w, jnp.reshape(z, w.shape), log_det))
    normals = jnp.reshape(retraced(model, guides[1], states, w), jnp.shape(z))
    return states, weight, (normals, lax.stop_gradient(jnp.max(jnp.abs(w))))


def _central_path(
    model: StateSpaceModel, guide: Guide, start: Array, z: Array, normal: bool
) -> Float[Array, "N d"]:
    """The path that a guide heads for, innovations zero; its reference where that is lost."""
    if normal:
        x0, _ = guided_start(model, guide, jnp.zeros_like(model.init_mean))
    else:
        x0 = _filled(model, start)
    path = guided_path(model, guide, x0, jnp.zeros_like(z)).path
    return jnp.where(jnp.all(jnp.isfinite(path)), path, guide.reference)


def _start_sites(name: str, site: Unwrapped) -> tuple[Array, bool]:
    """The first state or the site that makes it, and whether that is one of standard normals."""
    path = site.path
    path._require_innovations()
    path.scheme.require_smooth("GuidedReparam")
    start = path.fixed_start
    if start is not None:
        return start, False
    if is_gaussian(path.init):
        return latent(f"{name}_init_innov", path.init, site, path.state_shape), True
    return latent(f"{name}_init", path.init, site), False


def _filled(model: StateSpaceModel, start: Array) -> Float[Array, " d"]:
    """The user's first state, or its normals, with zeros for what the model carries besides."""
    start = jnp.ravel(start)
    return jnp.concatenate([start, jnp.zeros(model.dim - start.size, start.dtype)])


def carried(model: StateSpaceModel, reference: Float[Array, "N d"]) -> Float[Array, "N d"]:
    """A reference path with all that the model carries along it."""
    if reference.shape[-1] == model.dim:
        return reference
    path = model.visible(reference)
    return model.scheme.lift(model.sde, model.times, model.dt, path, model.cache)


def _prior_start(path: SDEPath, z: Array) -> Array:
    """First state of a normal law from standard normals `(*lead, *state)`."""
    mean, cov = mean_and_cov(path.init, len(path.state_shape))
    x0 = mean + matvec(psd_factor(cov), z if path.state_shape else z[..., None])
    return x0 if path.state_shape else x0[..., 0]


def _along_reference(name: str, site: Unwrapped, reference: Any) -> Array:
    """The sites of a guided path, and its reference in the place of the path."""
    path = site.path
    _start_sites(name, site)
    latent(f"{name}_innov", path.init, site, path.innovation_shape)

    def visible(model: StateSpaceModel, reference: Array) -> Array:
        return model.visible(reference)

    value = ObservedPath(path, site.lead).map(visible, (jnp.asarray(reference),), (2,))
    remember_value(value, path.clock)
    return value


def _along(
    owner: GuidedReparam, name: str, site: Unwrapped, run: Run, reference: Any
) -> tuple[Array, Any]:
    return _guided_site(name, site, look_ahead(name, run), reference, None, owner.follow)


def _first(
    owner: GuidedReparam, name: str, site: Unwrapped, run: Run, careful: bool
) -> tuple[Array, Array, Array]:
    """A first path and reference, before any search, and the components that data have placed."""
    data, path = look_ahead(name, run), site.path
    _start_sites(name, site)
    latent(f"{name}_innov", path.init, site, path.innovation_shape)
    observed = ObservedPath(path, site.lead, tuple(data))
    given = owner._given(name, site)
    everything = jnp.array(True)
    if not isinstance(given, str):
        model_reference = observed.map(carried, (given,), (2,))
        value = jnp.reshape(given, site.lead + path.event_shape)
        remember_value(value, path.clock)
        return value, model_reference, everything

    def one(model: StateSpaceModel) -> tuple[Array, Array, Array]:
        seen = everything
        if given == "data":
            reference = data_reference(model)
        elif careful:
            reference = believed_guide(model).guide.reference
        else:
            reference, seen = seen_reference(model)
        return model.visible(reference), reference, seen

    value, reference, seen = observed.map(one)
    remember_value(value, path.clock)
    return value, reference, seen


_GUIDING = Guiding(lambda chosen: isinstance(chosen, GuidedReparam), _along, _first)
