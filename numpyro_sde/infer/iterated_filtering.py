"""Iterated filtering: maximum likelihood for models with latent paths, by simulation alone.

Source: Ionides, Nguyen, Atchadé, Stoev and King (2015), "Inference for dynamic and latent variable
models via iterated, perturbed Bayes maps", PNAS 112, algorithm IF2; the geometric cooling and its
name as users of pomp know it (King, Nguyen and Ionides 2016).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm.auto import trange

from numpyro_sde.distributions.state_space import draw_starts, with_starts
from numpyro_sde.filters.particle import Particle
from numpyro_sde.handlers import marginalize
from numpyro_sde.infer.likelihood_fit import LikelihoodFit, log_mean_exp
from numpyro_sde.infer.parameter_space import ParameterSpace
from numpyro_sde.infer.perturbed import Perturbation, PerturbedFilter
from numpyro_sde.infer.profile import Profile
from numpyro_sde.infer.racing import LikelihoodEstimator
from numpyro_sde.models.reading import read_model, refuse_weighted
from numpyro_sde.models.survey import survey
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.runtime.progress import told
from numpyro_sde.smc.proposals import Proposal
from numpyro_sde.smc.resampling import Resampling
from numpyro_sde.smc.settings import make_setting
from numpyro_sde.statespace.checks import check_brownian, check_count, typed_key
from numpyro_sde.statespace.exact import refuse_exact
from numpyro_sde.statespace.model import StateSpaceModel

# Iterations after which perturbations are `cooling` times what they were, as in pomp.
_COOLING_SPAN = 50.0


class Cooling(NamedTuple):
    """Where a pass stands in the schedule: factors at its beginning and from there to its end."""

    level: Any
    within: Any


@entry_point
def prior_points(model: Any, args: Any, kwargs: Any, keys: PRNGKeyArray) -> Float[Array, "S D"]:
    """Draws of the priors as starts, unconstrained."""
    space = ParameterSpace(model, args, kwargs)
    return jax.vmap(space.prior_draw)(keys)


@entry_point
def perturbed_passes(
    model: Any,
    args: Any,
    kwargs: Any,
    z: Float[Array, "S D M"],
    keys: PRNGKeyArray,
    sds: tuple[Float[Array, "S D"], Float[Array, "S D"]],
    cooling: Cooling,
    resampler: Any,
) -> tuple[Float[Array, "S D M"], Float[Array, " S"]]:
    """One pass through all data for each start; swarms and perturbed log likelihoods."""
    space = ParameterSpace(model, args, kwargs)

    def one(z: Array, key: PRNGKeyArray, start: Array, later: Array) -> tuple[Array, Array]:
        total = jnp.zeros((), z.dtype)
        for number, name in enumerate(space.paths):
            own = jax.random.fold_in(key, number)
            sd = (cooling.level * start, cooling.level * later)
            z, value = _through_path(space, name, z, own, sd, cooling, resampler, number == 0)
            total = total + value
        return z, total

    return jax.vmap(one)(z, keys, *sds)


def _through_path(
    space: ParameterSpace,
    name: str,
    z: Array,
    key: PRNGKeyArray,
    sd: tuple[Array, Array],
    cooling: Cooling,
    resampler: Any,
    first: bool,
) -> tuple[Array, Array]:
    """Filter the series of one path site one after another."""
    lead, _ = space.paths[name]
    series = list(itertools.product(*(range(size) for size in lead)))
    masks = jnp.asarray(np.stack([space.belonging(name, index) for index in series]))
    elsewhere = None
    if first and space.has_other_data:

        def elsewhere(z: Array) -> Array:
            return space.log_likelihood_elsewhere(space.constrain(z)) / len(series)

    def one(z: Array, now: Any) -> tuple[Array, Array]:
        index, own, key = now
        build = partial(_series_model, space, name, tuple(index))
        perturbation = Perturbation(*sd, cooling.within, own)
        swarm = PerturbedFilter(build, elsewhere, perturbation, resampler).run(z, key)
        return swarm.z, swarm.log_likelihood

    places = jnp.asarray(np.array(series, int).reshape(len(series), len(lead)))
    keys = jax.random.split(key, len(series))
    if len(series) == 1:
        return one(z, (places[0], masks[0], keys[0]))
    z, values = lax.scan(one, z, (places, masks, keys))
    return z, jnp.sum(values)


def _series_model(
    space: ParameterSpace, name: str, index: tuple[Any, ...], z: Array, key: PRNGKeyArray
) -> StateSpaceModel:
    """The state-space model of one series under unconstrained parameters."""
    reading = read_model(space.model, space.args, space.kwargs, known=space.constrain(z))
    observed = reading.observed[name]
    starts = draw_starts(observed.path, observed.lead, 1, key)
    found: list[StateSpaceModel] = []

    def keep(model: StateSpaceModel, *starts: Array) -> Array:
        found.append(with_starts(model, *starts))
        return jnp.zeros(())

    dims = tuple(1 + len(observed.path.state_shape) for _ in starts)
    observed.map(keep, starts, dims, at=index)
    return found[0]


@entry_point
def estimated_log_likelihoods(
    model: Any,
    args: Any,
    kwargs: Any,
    method: LikelihoodEstimator,
    points: Float[Array, "P D"],
    keys: PRNGKeyArray,
) -> Float[Array, "P R"]:
    """Independent estimates of the log likelihood at each point, keys `(P, R)`."""
    space = ParameterSpace(model, args, kwargs)

    def one(point: Array, key: PRNGKeyArray) -> Array:
        treated = marginalize(model, method=method)
        value = space.log_likelihood(treated, space.constrain(point), key)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    return lax.map(lambda now: lax.map(lambda key: one(now[0], key), now[1]), (points, keys))


class IteratedFiltering:
    """Maximum likelihood by a particle filter on perturbed parameters, for any path law.

    Only draws of the model's steps and densities of its emissions are needed, so it takes what no
    gradient goes through: counts, jumps, switching regimes. Parameters are the latent sites but for
    paths; their supports are kept (perturbations are on the unconstrained scale) and their priors
    used for starts alone: the likelihood is maximised, not the posterior. Several starts run side
    by side in one program. Where the model has a gradient (Gaussian filters, `infer.score`),
    ascending that is faster; for a posterior take `infer.PMMH` or NUTS.

    Args:
        model: the model, its path sites as they are.
        num_particles: particles of each pass.
        num_iterations: passes through the data.
        num_starts: starts from draws of the priors, where `run` is not given others.
        perturbation: standard deviation of the perturbation before each observation, on the
            unconstrained scale: a number for all sites, or a dictionary by site, whose entries
            broadcast to the site; 0 holds a parameter where it starts, sites left out get 0.02.
        cooling: factor by which perturbations have shrunk after 50 iterations.
        initial: sites that act through the first state alone: perturbed before the first
            observation only.
        proposal: how the particles of the plain filters at the estimates move, as in
            `filters.Particle`; perturbed passes always use the model's own steps.
        resampling: as in `filters.Particle`.
        evaluation_particles: particles of the plain filters; None for `num_particles`.
        num_replicates: plain filters at each estimate, at least 2.
        progress_bar: whether to show one.

    Raises:
        ValueError: an option out of range. When run: a model without latent path or with random
            effects, data that depend on a path outside of `observe`, starts outside of supports.
        TypeError: a count that is no integer.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(9.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> search = nsde.infer.IteratedFiltering(model, 200, num_iterations=10, num_starts=2,
        ...                                       progress_bar=False)
        >>> y = np.array([0.5, -0.2, 0.1, 0.4, -1.1, 0.3, 0.2, -0.6, 0.0])
        >>> fit = search.run(jax.random.key(0), y)
        >>> fit.starts["scale"].shape, bool(fit.standard_error < 0.5)
        ((2,), True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_particles: int = 1000,
        *,
        num_iterations: int = 50,
        num_starts: int = 4,
        perturbation: float | Mapping[str, Any] = 0.02,
        cooling: float = 0.5,
        initial: Sequence[str] = (),
        proposal: str | Proposal = "bootstrap",
        resampling: str | Resampling = "systematic",
        evaluation_particles: int | None = None,
        num_replicates: int = 10,
        progress_bar: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        if isinstance(model, marginalize):
            raise TypeError(
                "IteratedFiltering integrates paths out itself: hand over the model inside"
            )
        self._setting = make_setting(num_particles, proposal, resampling, 1.0, least=2)
        check_count("num_iterations", num_iterations)
        check_count("num_starts", num_starts)
        check_count("num_replicates", num_replicates, least=2)
        if evaluation_particles is not None:
            check_count("evaluation_particles", evaluation_particles)
        if not 0.0 < cooling <= 1.0:
            raise ValueError(f"cooling must be above 0 and at most 1, got {cooling}")
        if isinstance(initial, str):
            raise TypeError(f"initial must be a list of names, got the string {initial!r}")
        given = perturbation.values() if isinstance(perturbation, Mapping) else [perturbation]
        for value in given:
            if not np.all(np.isfinite(value)) or np.any(np.asarray(value) < 0):
                raise ValueError(f"perturbation must be 0 or more, got {value}")
        self.model = model
        self.num_particles, self.num_iterations = num_particles, num_iterations
        self.num_starts, self.cooling = num_starts, float(cooling)
        self.perturbation, self.initial = perturbation, tuple(initial)
        self.proposal, self.resampling = proposal, resampling
        self.evaluation_particles = evaluation_particles or num_particles
        self.num_replicates = num_replicates
        self.progress_bar = progress_bar

    def run(
        self,
        rng_key: PRNGKeyArray,
        *args: Any,
        init_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> LikelihoodFit:
        """Search from several starts and evaluate the likelihood at what each has found.

        Args:
            rng_key: random key.
            *args: arguments of the model, the data included.
            init_params: starts by site on their own scale, with a leading axis over starts; None
                for draws of the priors.
            **kwargs: keyword arguments of the model.

        Returns:
            The estimate of the best start, and those of all.
        """
        space = self._space(args, kwargs)
        start_key, rng_key = jax.random.split(typed_key(rng_key))
        if init_params is None:
            keys = jax.random.split(start_key, self.num_starts)
            points = prior_points(self.model, args, kwargs, keys)
        else:
            points = jax.vmap(space.flat)(_same_lead(space, init_params))
        return self._search(rng_key, space, points, self._sds(space, len(points)))

    def resume(
        self, rng_key: PRNGKeyArray, fit: LikelihoodFit, num_iterations: int | None = None
    ) -> LikelihoodFit:
        """Go on where a fit of this model has stopped, its swarms and cooling included.

        Args:
            rng_key: random key.
            fit: what `run` returned, perhaps in another process.
            num_iterations: further passes; None for as many as `num_iterations`.
        """
        space = self._space(fit.model_args, fit.model_kwargs)
        sds = self._sds(space, fit.swarm.shape[0])
        return self._search(typed_key(rng_key), space, fit, sds, num_iterations)

    def profile(
        self,
        rng_key: PRNGKeyArray,
        fit: LikelihoodFit,
        site: str,
        values: Sequence[float],
        *,
        num_starts: int = 2,
        level: float = 0.95,
    ) -> Profile:
        """Profile likelihood of a scalar site, with a Monte Carlo adjusted interval.

        The site is held at each value while all others are searched for, from the best starts of a
        fit; all values run side by side. The interval is that of Ionides, Bretó, Park, Smith and
        King (2017): it is wider where the likelihoods are noisy, so cheap filters will do.

        Args:
            rng_key: random key.
            fit: a fit of this model.
            site: a scalar parameter.
            values: where to hold it: 15 or more, over more than the interval to be found.
            num_starts: searches at each value; the best is kept.
            level: of the interval.

        Raises:
            ValueError: no scalar parameter of that name, fewer than 4 values, or one outside the
                support.
        """
        space = self._space(fit.model_args, fit.model_kwargs)
        if site not in space.names or np.shape(fit.params[site]) != ():
            scalars = [name for name in space.names if np.shape(fit.params[name]) == ()]
            raise ValueError(f"site must be a scalar parameter, one of {scalars}, got {site!r}")
        grid = np.asarray(values, float)
        if grid.ndim != 1 or np.unique(grid).size < 4:
            raise ValueError(f"values must be at least 4 different numbers, got {values}")
        check_count("num_starts", num_starts)
        best = np.argsort(-fit.log_likelihoods)[np.arange(num_starts) % len(fit.log_likelihoods)]
        starts = {name: np.asarray(fit.starts[name])[best] for name in space.names}
        whole = {name: np.tile(v, (grid.size,) + (1,) * (v.ndim - 1)) for name, v in starts.items()}
        whole[site] = np.repeat(grid, num_starts)
        points = jax.vmap(space.flat)({k: jnp.asarray(v) for k, v in whole.items()})
        held = np.asarray(space.by_component({site: 0.0}, 1.0))
        start, later = self._sds(space, len(points))
        found = self._search(typed_key(rng_key), space, points, (start * held, later * held))
        shape = (grid.size, num_starts)
        values_at = found.log_likelihoods.reshape(shape)
        chosen = np.argmax(values_at, axis=1)
        pick = (np.arange(grid.size), chosen)
        return Profile(
            site,
            grid,
            values_at[pick],
            found.standard_errors.reshape(shape)[pick],
            {n: np.asarray(v).reshape(*shape, *v.shape[1:])[pick] for n, v in found.starts.items()},
            level,
        )

    def log_likelihood(
        self, rng_key: PRNGKeyArray, params: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[float, float]:
        """Log likelihood of parameters by plain filters, and its standard error.

        Args:
            rng_key: random key.
            params: values of all parameter sites.
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        space = self._space(args, kwargs)
        value, error = self._evaluate(typed_key(rng_key), space, space.flat(params)[None])
        return float(value[0]), float(error[0])

    def _space(self, args: Any, kwargs: Any) -> ParameterSpace:
        space = ParameterSpace(self.model, args, kwargs)
        survey(self.model, args, kwargs).refuse_other_uses()
        reading = read_model(self.model, args, kwargs)
        for name, observed in reading.observed.items():
            refuse_weighted(reading.paths[name], name, "IteratedFiltering")
            jax.eval_shape(lambda observed=observed: observed.map(_check))
        named = [
            *self.initial,
            *(self.perturbation if isinstance(self.perturbation, Mapping) else ()),
        ]
        if unknown := [name for name in named if name not in space.names]:
            raise ValueError(
                f"perturbation and initial name {unknown}, but the parameters are "
                f"{list(space.names)}"
            )
        return space

    def _sds(self, space: ParameterSpace, num_starts: int) -> tuple[np.ndarray, np.ndarray]:
        given = self.perturbation
        if isinstance(given, Mapping):
            start = space.by_component(given, 0.02)
        else:
            start = space.by_component({}, given)
        later = start * space.by_component(dict.fromkeys(self.initial, 0.0), 1.0)
        return np.tile(start, (num_starts, 1)), np.tile(later, (num_starts, 1))

    def _search(
        self,
        key: PRNGKeyArray,
        space: ParameterSpace,
        begin: Any,
        sds: tuple[np.ndarray, np.ndarray],
        num_iterations: int | None = None,
    ) -> LikelihoodFit:
        """Perturbed passes from points, or from where a fit stands, then plain filters."""
        number = self.num_iterations if num_iterations is None else num_iterations
        run_key, evaluate_key = jax.random.split(key)
        if isinstance(begin, LikelihoodFit):
            z, done = jnp.asarray(begin.swarm), begin.num_iterations
            means, values = [*begin.trace_points], [*begin.trace_log_likelihood]
        else:
            z = jnp.repeat(begin[:, :, None], self.num_particles, axis=2)
            done, means, values = 0, [np.asarray(begin)], []
        on_device = jnp.asarray(sds[0], z.dtype), jnp.asarray(sds[1], z.dtype)
        rate = self.cooling ** (1.0 / _COOLING_SPAN)
        bar = trange(number, disable=not self.progress_bar, desc="iterated filtering")
        for i in bar:
            keys = jax.random.split(jax.random.fold_in(run_key, i), z.shape[0])
            cooling = Cooling(jnp.asarray(rate ** (done + i), z.dtype), jnp.asarray(rate, z.dtype))
            z, value = perturbed_passes(
                self.model,
                space.args,
                space.kwargs,
                z,
                keys,
                on_device,
                cooling,
                self._setting.resampler,
            )
            means.append(np.asarray(jnp.mean(z, axis=2)))
            values.append(np.asarray(value))
            bar.set_postfix_str(f"log likelihood of the best {np.max(value):.2f}", refresh=False)
        with told("likelihoods at the estimates", self.progress_bar):
            found, errors = self._evaluate(evaluate_key, space, jnp.asarray(means[-1], z.dtype))
        return LikelihoodFit.of(space, found, errors, means, values, np.asarray(z), done + number)

    def _evaluate(
        self, key: PRNGKeyArray, space: ParameterSpace, points: Array
    ) -> tuple[np.ndarray, np.ndarray]:
        method = LikelihoodEstimator(
            self.evaluation_particles, proposal=self.proposal, resampling=self.resampling
        )
        keys = jax.random.split(key, (points.shape[0], self.num_replicates))
        runs = estimated_log_likelihoods(self.model, space.args, space.kwargs, method, points, keys)
        found = [log_mean_exp(row) for row in np.asarray(runs, float)]
        return np.array([v for v, _ in found]), np.array([e for _, e in found])


def _check(model: StateSpaceModel) -> Array:
    """Refuse what the model's own steps cannot be weighed under."""
    refuse_exact(model, "IteratedFiltering")
    check_brownian(model, "IteratedFiltering")
    Particle(2, proposal="bootstrap").check(model)
    return jnp.zeros(())


def _same_lead(space: ParameterSpace, values: Mapping[str, Any]) -> dict[str, Array]:
    """Starts by site with one leading axis; single values become one start."""
    space.flat({n: np.asarray(v)[0] if _has_lead(space, n, v) else v for n, v in values.items()})
    lead = {len(np.asarray(v)) for n, v in values.items() if _has_lead(space, n, v)} or {1}
    if len(lead) > 1:
        raise ValueError(f"init_params must have one leading axis over starts, got lengths {lead}")
    count = lead.pop()
    return {
        n: jnp.asarray(v, jnp.result_type(float))
        if _has_lead(space, n, v)
        else jnp.broadcast_to(jnp.asarray(v, jnp.result_type(float)), (count, *np.shape(v)))
        for n, v in values.items()
    }


def _has_lead(space: ParameterSpace, name: str, value: Any) -> bool:
    return name in space.sites and np.ndim(value) > space.ndim(name)
