"""The guided path: whitened under its law given the observations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import biject_to
from numpyro.handlers import reparam, seed, substitute
from numpyro.infer.initialization import init_to_median
from numpyro.infer.reparam import Reparam
from numpyro.infer.util import log_density
from scipy.optimize import minimize

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.moments import is_gaussian, mean_and_cov
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import run_on_model
from numpyro_sde.distributions.statement import Statement
from numpyro_sde.linear.small import matvec, psd_factor
from numpyro_sde.models.reading import read_model
from numpyro_sde.models.stack import Run, enclosing_run, outside_all_handlers
from numpyro_sde.reparam.path import (
    Unwrapped,
    is_innovation,
    latent,
    leave_alone,
    unwrap,
)
from numpyro_sde.statespace.guide import Guide, guided_path, guided_start, make_guide
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import believed_guide, data_reference

Reference = Literal["smoother", "data"]

# Rounds of search for the plug-in parameters, each along a new reference path, and steps in one.
_ROUNDS, _STEPS = 3, 20
_MAX_PLANS = 4


class Plan(NamedTuple):
    """Where to linearise, and the guide at the plug-in parameters; NumPy arrays."""

    reference: np.ndarray  # (*lead, N, d)
    H: np.ndarray  # (*lead, N, d, d)
    e: np.ndarray  # (*lead, N, d)


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

    Raises:
        TypeError: the site is no `SDEPath`, or its scheme is no map of Gaussian innovations.
        ValueError: an unknown reference; a reference that does not fit the path; a path that is
            observed or conditioned on; a handler that wraps no model.

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
    ) -> None:
        if isinstance(reference, str) and reference not in get_args(Reference):
            raise ValueError(
                f"reference must be 'smoother', 'data' or an array of states, got {reference!r}"
            )
        if at is not None and not isinstance(at, Mapping):
            raise TypeError(f"at must map names of sites to values, got {type(at).__name__}")
        self.reference = reference
        self.at = None if at is None else dict(at)
        self.frozen = frozen
        self._plans: list[tuple[Any, bytes, dict[str, Plan]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": []}

    def refreshed(self, name: str, samples: Mapping[str, ArrayLike]) -> GuidedReparam:
        """The same guide along the mean of posterior draws, at their mean parameters.

        For after a warm-up: run a few hundred draws, refresh, and start the long run.

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
        return GuidedReparam(reference, at=at, frozen=self.frozen)

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        if leave_alone(name, obs, self):
            return fn, obs
        site = unwrap(name, fn, self)
        run = enclosing_run(sys._getframe(1), name, type(self).__name__)
        data = look_ahead(name, run)
        if not data:
            return None, _guided_site(name, site, [], None, None)[0]
        plan = None
        # States that the user gave are the reference as they are.
        searched = self.frozen or isinstance(self.reference, str)
        if searched and run.is_concrete and _is_concrete(site.path, data):
            plan = self._plan(run).get(name)
        if plan is None:
            return None, _guided_site(name, site, data, self._given(name, site), None)[0]
        guide = plan if self.frozen else None
        return None, _guided_site(name, site, data, plan.reference, guide)[0]

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

    def _plan(self, run: Run) -> dict[str, Plan]:
        """Find the plug-in parameters and the reference paths, once for each data set."""
        key = run.digest()
        for fn, known, plans in self._plans:
            if fn is run.fn and known == key:
                return plans
        try:
            with outside_all_handlers():
                plans, users = _make_plans(run)
        except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError):
            return {}  # the model closes over traced values: nothing is known beforehand
        for user in users:
            user._plans = [*user._plans[1 - _MAX_PLANS :], (run.fn, key, plans)]
        return plans


def _is_concrete(path: SDEPath, data: list[tuple[Statement, Array]]) -> bool:
    values = [path.times, *(y for _, y in data)]
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def look_ahead(name: str, run: Run) -> list[tuple[Statement, Array]]:
    """Observation statements of a path, with their data, in a run of the model."""
    reading = read_model(run.conditioned(run.fn), run.args, run.kwargs, known=run.known, only=name)
    observed = reading.observed.get(name)
    return [] if observed is None else list(observed.data)


def _guided_site(
    name: str,
    site: Unwrapped,
    data: list[tuple[Statement, Array]],
    reference: Any,
    frozen: Plan | None,
) -> tuple[Array, Any]:
    """Make the auxiliary sites and the factor of a path; give it, the guide and the states used."""
    path = site.path
    path._require_innovations()
    path.scheme.require_smooth("GuidedReparam")
    start = path.fixed_start
    normal = start is None and is_gaussian(path.init)
    if normal:
        start = latent(f"{name}_init_innov", path.init, site, path.state_shape)
    elif start is None:
        start = latent(f"{name}_init", path.init, site)
    z = latent(f"{name}_innov", path.init, site, path.innovation_shape)
    dims: tuple[int, ...] = (len(path.state_shape), len(path.innovation_shape))
    if not data:
        value = path.forward(_prior_start(path, start) if normal else start, z)
        remember_value(value, path.clock, mask=site.mask)
        return value, None
    arrays: tuple[Any, ...] = (start, z)
    if not isinstance(reference, str):
        arrays, dims = (*arrays, reference), (*dims, 2)
    if frozen is not None:
        arrays, dims = (*arrays, frozen.H, frozen.e), (*dims, 3, 2)

    def one(model: StateSpaceModel, start: Array, z: Array, *given: Array) -> Any:
        if frozen is not None:
            guide = Guide(*(jnp.asarray(a, z.dtype) for a in given))
        elif given:
            guide = make_guide(model, carried(model, jnp.asarray(given[0], z.dtype)))
        elif reference == "smoother":
            guide = believed_guide(model).guide
        else:
            guide = make_guide(model, data_reference(model))
        if normal:
            x0, weight = guided_start(model, guide, _filled(model, start))
        else:
            x0, weight = _filled(model, start), jnp.zeros((), z.dtype)
        states, more = guided_path(model, guide, x0, z)
        return model.visible(states), weight + more, guide, states

    # As one compiled function: a run outside `jit` would else compile every operation apart.
    value, log_weight, guide, states = jax.jit(
        lambda *arrays: run_on_model(path, site.lead, data, one, arrays, dims)
    )(*arrays)
    with numpyro.handlers.mask(mask=site.mask):
        numpyro.factor(f"{name}_guide", log_weight)
    remember_value(value, path.clock, mask=site.mask)
    return value, (guide, states)


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


class _Along(Reparam):
    """A guided path along a reference handed in, for the search of the plug-in parameters."""

    def __init__(self, owner: GuidedReparam, references: Mapping[str, Any], found: dict) -> None:
        self.owner, self.references, self.found = owner, references, found

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Array]:  # noqa: ARG002
        site = unwrap(name, fn, self.owner)
        run = enclosing_run(sys._getframe(1), name, type(self.owner).__name__)
        data = look_ahead(name, run)
        reference = self.references.get(name)
        if reference is None:
            reference = self.owner._given(name, site)
        value, found = _guided_site(name, site, data, reference, None)
        if found is not None:
            guide, states = found
            self.found[name] = (states, guide)
        return None, value


def _make_plans(run: Run) -> tuple[dict[str, Plan], list[GuidedReparam]]:
    """Search for the posterior mode along the guided paths, moving the reference to them."""
    users: list[GuidedReparam] = []
    given: set[str] = set()  # paths along states that the user gave

    def guided_model(references: Mapping[str, Any], found: dict) -> Any:
        def config(site: Any) -> Any:
            chosen = run.config(site)
            if not isinstance(chosen, GuidedReparam):
                return chosen
            if not any(chosen is user for user in users):
                users.append(chosen)
            if not isinstance(chosen.reference, str):
                given.add(site["name"])
            return _Along(chosen, references, found)

        return run.conditioned(reparam(run.fn, config=config))

    median = init_to_median(num_samples=15)

    unravel: list[Any] = []

    def start() -> tuple[Any, Any]:
        """Unconstrained medians of the free sites as one vector, and the guided paths there."""
        free: dict[str, Array] = {}
        found: dict[str, Any] = {}

        def value(site: Any) -> Any:
            fixed = _given_value(site, users)
            if fixed is not None or site["type"] != "sample" or site["is_observed"]:
                return fixed
            value = median(site)
            if value is not None and not site["fn"].support.is_discrete:
                free[site["name"]] = biject_to(site["fn"].support).inv(value)
            return value

        substitute(seed(guided_model({}, found), 0), substitute_fn=value)(*run.args, **run.kwargs)
        flat, back = ravel_pytree(free)
        unravel.append(back)
        return flat.astype(jnp.result_type(float)), found

    def objective(flat: Array, references: Any) -> tuple[Array, Any]:
        """Minus the log density of unconstrained values with innovations of zero."""
        unconstrained = unravel[0](flat)
        found: dict[str, Any] = {}
        log_det = [jnp.zeros(())]

        def value(site: Any) -> Any:
            u = unconstrained.get(site["name"])
            if u is None:
                return _given_value(site, users)
            transform = biject_to(site["fn"].support)
            value = transform(u)
            log_det.append(jnp.sum(transform.log_abs_det_jacobian(u, value)))
            return value

        model = substitute(seed(guided_model(references, found), 0), substitute_fn=value)
        log_joint, _ = log_density(model, run.args, run.kwargs, {})
        return -(log_joint + sum(log_det)), found

    # Compiled ahead of time: a compiled function runs at once, also inside an outer trace.
    flat, found = jax.tree.map(np.asarray, jax.jit(start).lower().compile()())
    references = _moved(found, given)
    both = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return _search(both.lower(flat, references).compile(), flat, references, given), users


def _given_value(site: Any, users: list[GuidedReparam]) -> Any:
    """A plug-in value that the user gave; zero for innovations, so that paths are guided means."""
    if site["type"] == "sample" and is_innovation(site["name"]):
        return jnp.zeros(site["fn"].shape())
    for user in users:
        if user.at is not None and site["name"] in user.at:
            return jnp.asarray(user.at[site["name"]])
    return None


def _search(
    objective: Any, flat: np.ndarray, references: dict[str, Any], given: set[str]
) -> dict[str, Plan]:
    """Alternate between parameters that fit best and the guided paths at them."""

    def evaluate(x: np.ndarray) -> tuple[np.ndarray, Any, np.ndarray]:
        (value, found), gradient = objective(x.astype(flat.dtype), references)
        return jax.tree.map(np.asarray, (value, found, gradient))

    def on_host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, _, gradient = evaluate(x)
        finite = bool(np.isfinite(value))
        return (float(value) if finite else 1e30), np.nan_to_num(gradient.astype(np.float64))

    best = flat.astype(np.float64)
    for _ in range(_ROUNDS):
        if best.size:
            options = {"maxiter": _STEPS}
            best = minimize(on_host, best, jac=True, method="L-BFGS-B", options=options).x
        references = _moved(evaluate(best)[1], given)
    return {name: Plan(*guide) for name, (_, guide) in evaluate(best)[1].items()}


def _moved(found: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The guided paths as the next references; those given, and what is not finite, stay."""
    return {
        name: guide.reference if name in given or not np.all(np.isfinite(states)) else states
        for name, (states, guide) in found.items()
    }
