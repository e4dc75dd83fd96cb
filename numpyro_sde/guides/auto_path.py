"""`AutoPathGuide`: a guide over parameters and paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_value

from numpyro_sde.describe import html_text
from numpyro_sde.fields.field import recorded_fields
from numpyro_sde.guides.auto import AutoFlow
from numpyro_sde.guides.conjugate import AutoConjugate
from numpyro_sde.guides.matched import MatchedPath
from numpyro_sde.guides.path_laws import GaussianMarkovPath, PathLaw
from numpyro_sde.guides.path_posterior import PathPosterior, Plan
from numpyro_sde.guides.path_sites import (
    NoDataError,
    batch_sizes,
    check_site,
    is_traced,
    look,
    sizes_of,
    smoothed_references,
    trace_at_median,
    with_full_plates,
    without_paths,
)
from numpyro_sde.guides.score import ConditionalScorePath
from numpyro_sde.guides.split import AutoSplit, weight_sites
from numpyro_sde.guides.weight_statistics import (
    WeightStatistics,
    check_conjugate,
    paths_of_weights,
    weight_statistics,
)
from numpyro_sde.infer.start import approximate_mode
from numpyro_sde.models.reading import latent_paths
from numpyro_sde.models.stack import outside_all_handlers, substituted_here
from numpyro_sde.runtime.entry import Held, entry_point

# A network is told of the shared parameters if there are no more of them than this.
_MAX_THETA = 16
# Draws made together, and draws behind a quantile.
_BATCH = 64
# Weights of fields up to which a flow is over them too.
_MAX_FLOW_WEIGHTS = 50
_QUANTILE_DRAWS = 4000


class AutoPathGuide(AutoGuide):
    r"""`q(parameters) q(path | parameters, data)`, as an automatic guide.

    The parameters have a normalizing flow, each path of the model one of the laws in
    `nsde.guides`: a correction, learned, of the guide that `GuidedReparam` and the guided
    particle filter use, at the parameters drawn. It works with `SVI` and its bounds, `Predictive`,
    plates of series and subsampled plates, and returns paths under their own names.

    The data must be observed by `nsde.observe`. They are looked up in each call; a call without
    them (as for posterior prediction) uses those of the first.

    Args:
        model: the model, its paths neither reparametrised nor integrated out.
        parameters: makes a guide of the parameters from a model without its paths: `AutoFlow`
            (the default; for weights of fields see `weights`), a guide of NumPyro (`AutoNormal`,
            for parameters in a subsampled plate), or any function of a model that returns a guide.
        path: the law of the paths.
        prefix: put before the names of the parameters of the path laws, `{site}_{prefix}_...`.
        init: "mode" starts the parameters at the mode of the model with its paths integrated out
            by an extended Kalman filter; "median" leaves them to their guide.
        gradient: "landing" leaves the score of a path's law out of the bound's gradient: it has
            mean zero, and without it the gradient has no noise where the law is exact (Roeder,
            Wu, Duvenaud 2017, "Sticking the landing"). "path" keeps it, as importance-weighted
            bounds (`RenyiELBO`) need.
        weights: the law of the weights of fields: "conjugate", their prior times a normal
            likelihood (`AutoConjugate`; where the drift of the one path is linear in them under
            `Euler()`, and the noise does not use them); "low_rank" (`AutoSplit`); "flow", as all
            else; "auto", the first where it can be, else a flow up to 50 weights and a law of low
            rank for more.

    Raises:
        ValueError: a model without a latent path, without data for one, or with a path that the
            law cannot treat (without density, a step without unique innovations).
        TypeError: arguments of the wrong kind.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> guide = nsde.guides.AutoPathGuide(model)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        >>> y = jax.numpy.array([0.8, 0.5, 0.2])
        >>> fit = svi.run(jax.random.key(0), 20, y, progress_bar=False)
        >>> draws = guide.sample_posterior(jax.random.key(1), fit.params, y, sample_shape=(10,))
        >>> {name: value.shape for name, value in draws.items()}
        {'rate': (10,), 'x': (10, 3)}
    """

    _prototype_frames: dict[str, Any]

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        parameters: Callable[..., Any] | None = None,
        path: PathLaw | None = None,
        prefix: str = "auto",
        init: str = "mode",
        gradient: str = "landing",
        weights: str = "auto",
    ) -> None:
        self._default = parameters is None
        if weights not in ("auto", "flow", "low_rank", "conjugate"):
            raise ValueError(
                f"weights must be 'auto', 'flow', 'low_rank' or 'conjugate', got {weights!r}"
            )
        if weights != "auto" and parameters is not None:
            raise ValueError("give weights or a guide of all parameters, not both")
        self.weights = weights
        parameters = AutoFlow if parameters is None else parameters
        if not callable(parameters):
            raise TypeError(
                f"parameters must make a guide from a model, got {type(parameters).__name__}"
            )
        path = GaussianMarkovPath() if path is None else path
        if not isinstance(path, PathLaw):
            raise TypeError(
                "path must be GaussianMarkovPath(), ControlledPath(), ConditionalScorePath() or "
                f"MatchedPath(), got {path!r}"
            )
        if init not in ("mode", "median"):
            raise ValueError(f"init must be 'mode' or 'median', got {init!r}")
        if gradient not in ("landing", "path"):
            raise ValueError(f"gradient must be 'landing' or 'path', got {gradient!r}")
        super().__init__(model, prefix=prefix)
        self.path = path
        self.gradient = gradient
        self.init = init
        self.parameters = parameters(without_paths(model))
        if not callable(self.parameters):
            raise TypeError(f"parameters must return a guide, a callable, got {self.parameters!r}")
        if isinstance(self.parameters, AutoGuide):
            self._take(self.parameters)
        self._plans: dict[str, Plan] = {}
        self._optimised: list[str] = []
        self._data: tuple[Any, Any] = ((), {})
        self._sites: dict[str, Any] = {}
        self._theta_start: Any = 0.0
        self._open: dict[str, Any] = {}
        self._draws: Any = None

    def __repr__(self) -> str:
        return f"AutoPathGuide(parameters={self.parameters!r}, path={type(self.path).__name__})"

    def _repr_html_(self) -> str:
        return html_text(repr(self))

    @property
    def has_parameters(self) -> bool:
        """Whether the model has unknowns besides its paths; known after the first call."""
        return bool(self._sites)

    def path_sites(self) -> tuple[str, ...]:
        """Names of the model's paths; known after the first call."""
        return tuple(self._plans)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample parameters and paths; arguments as for the model."""
        values: dict[str, Array] = {}
        for _ in self._posteriors(args, kwargs, values):
            pass
        return values

    def score_residual(self, *args: Any, **kwargs: Any) -> Float[Array, ""]:
        """Residual of the backward equation at one draw, for `ConditionalScorePath`.

        A statement of a guide, to be run under `seed` and `substitute`; see `fit_score`.
        """
        assert isinstance(self.path, ConditionalScorePath)
        law, total = self.path, jnp.zeros(())
        values: dict[str, Array] = {}
        for name, posterior in self._posteriors(args, kwargs, values):
            total = total + posterior.residual(law, values[name], numpyro.prng_key())
        return total

    def path_bound(
        self, model: Callable[..., Any], num_times: int, args: Any, kwargs: Any
    ) -> Float[Array, ""]:
        """Bound of the path's part of the evidence of a model, without a path, for `MatchedPath`.

        A statement of a guide, which samples the parameters; see `MatchedELBO`.
        """
        assert isinstance(self.path, MatchedPath)
        return self._only_law(args, kwargs, model).bound(self.path, numpyro.prng_key(), num_times)

    def natural_update(
        self, num_steps: int, args: Any, kwargs: Any
    ) -> tuple[dict[str, Array], Float[Array, " steps"]]:
        """Parameters of the path's law after natural-gradient steps, for `GaussianMarkovPath`.

        A statement of a guide, which samples the parameters; see `fit_natural`.
        """
        assert isinstance(self.path, GaussianMarkovPath)
        return self._only_law(args, kwargs, self.model).natural(self.path, num_steps)

    def weight_statistics(self, num_paths: int, args: Any, kwargs: Any) -> WeightStatistics:
        """What paths say of the weights at one draw of the parameters, for `AutoConjugate`.

        A statement of a guide, which samples the parameters; see `fit_conjugate`.
        """
        guide = self.parameters
        assert isinstance(guide, AutoConjugate)
        values: dict[str, Array] = {}
        posterior = self._only_law(args, kwargs, self.model, values)
        indices = {name: plate._indices for name, plate in self._open.items()}
        known = {**substituted_here(self._optimised), **indices, **values}
        (name,) = self._plans
        law_of = paths_of_weights(guide.layout, self.model, args, kwargs, known, name)
        rest = {k: v for k, v in values.items() if k not in guide.weights}
        at = guide.weights_given(rest, args, kwargs)
        paths = posterior.law().sample(numpyro.prng_key(), (num_paths,))
        own, others = guide.layout.joined(values), guide.rest_vector(values)
        return weight_statistics(law_of, others, own, at, paths, posterior.share)

    def _only_law(
        self,
        args: Any,
        kwargs: Any,
        model: Callable[..., Any],
        values: dict[str, Array] | None = None,
    ) -> PathPosterior:
        """Sample the parameters into `values`; the law of the only path."""
        laws = list(self._laws(args, kwargs, {} if values is None else values, model))
        if len(laws) > 1:
            raise ValueError(
                f"{type(self.path).__name__} is trained so in a model of one path, got "
                f"{[name for name, _ in laws]}: write them as one path with a vector state"
            )
        return laws[0][1]

    def _posteriors(
        self, args: Any, kwargs: Any, values: dict[str, Array]
    ) -> Iterator[tuple[str, PathPosterior]]:
        """Sample the parameters and then the paths into `values`; hand out the paths' laws."""
        for name, posterior in self._laws(args, kwargs, values):
            with posterior.plates():
                values[name] = numpyro.sample(name, posterior.law())
            yield name, posterior

    def _laws(
        self,
        args: Any,
        kwargs: Any,
        values: dict[str, Array],
        model: Callable[..., Any] | None = None,
    ) -> Iterator[tuple[str, PathPosterior]]:
        """Sample the parameters into `values`; hand out the law of each path given `values`."""
        model = self.model if model is None else model
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._open = plates = self._create_plates(*args, **kwargs)
        if self._sites:
            values.update(self.parameters(*args, **kwargs))
        theta = self._shared_vector(values) - self._theta_start
        indices = {name: plate._indices for name, plate in plates.items()}
        for name, plan in self._plans.items():
            # What SVI optimises in the model itself (`numpyro.param`) is in the path's law too.
            known = {**substituted_here(self._optimised), **indices, **values}
            try:
                site = look(model, args, kwargs, name, known)
            except NoDataError:
                whole = all(plate.size == plate.subsample_size for plate in plates.values())
                of_first = with_full_plates(model) if whole else model
                site = look(of_first, *self._data, name, known)
            posterior = PathPosterior(
                self.path, name, self.prefix, self.gradient, site, plan, plates, theta
            )
            yield name, posterior

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with recorded_fields() as fields:
            recorded = trace_at_median(self.model, args, kwargs)
        self._optimised = [n for n, site in recorded.items() if site["type"] == "param"]
        names = latent_paths(recorded)
        for name, site in recorded.items():
            if site["type"] == "plate":
                self._prototype_frame_full_sizes[name] = site["args"][0]
            elif site["type"] == "sample" and not site["is_observed"]:
                self._prototype_frames |= {f.name: f for f in site["cond_indep_stack"]}
        full = with_full_plates(self.model)
        self._sites = {
            name: site
            for name, site in trace_at_median(without_paths(full), args, kwargs).items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        start = {name: site["value"] for name, site in self._sites.items()}
        self._choose_weights(list(fields), full, args, kwargs, start)
        if start and self.init == "mode":
            mode, covariance = self._find_mode(full, args, kwargs)
            start |= mode
            if mode and isinstance(self.parameters, AutoFlow):
                self.parameters.init_scale = covariance
            if mode and isinstance(self.parameters, AutoSplit | AutoConjugate):
                ((own, block),) = covariance.items()
                self.parameters.start_at(mode, own, block, self._free_sizes(mode))
            if mode and isinstance(self.parameters, AutoGuide):
                # Sites in a subsampled plate begin at the median: their guide sees a batch.
                self.parameters.init_loc_fn = init_to_value(
                    values={
                        name: mode[name]
                        if jnp.shape(mode[name]) == jnp.shape(recorded[name]["value"])
                        else recorded[name]["value"]
                        for name in mode
                    }
                )
        theta = self._shared_vector(start)
        # A start that is known only inside a trace must not outlive it.
        self._theta_start = np.zeros(theta.shape) if is_traced(theta) else np.asarray(theta)
        for name in names:
            site = look(full, args, kwargs, name, start)
            check_site(name, site.path)
            found = None if self.path.amortized else smoothed_references(site)
            reference = None if found is None or is_traced(found) else np.asarray(found)
            frames = tuple(recorded[name]["cond_indep_stack"])
            self._plans[name] = Plan(frames, sizes_of(site, theta.size), reference)
        if not is_traced((args, kwargs)):
            self._data = (args, kwargs)
        self.prototype_trace = recorded

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plates of this call, with as many of their series as it takes.

        Not as many as the first call took: what was trained on mini-batches is drawn for all.
        """
        if self._prototype_frames:
            taken = batch_sizes(self.model, args, kwargs)
            self._prototype_frames = {
                name: frame._replace(size=taken.get(name, frame.size))
                for name, frame in self._prototype_frames.items()
            }
        plates: dict[str, Any] = super()._create_plates(*args, **kwargs)
        return plates

    def _choose_weights(
        self, fields: list[str], full: Callable[..., Any], args: Any, kwargs: Any, start: Any
    ) -> None:
        """Where weights of fields are unknown, keep the flow for the rest."""
        weights, kind = weight_sites(fields, list(self._sites)), self.weights
        if not self._default or kind == "flow" or (kind == "auto" and not weights):
            return
        if not weights:
            raise ValueError(f"weights={kind!r} needs a model with a field of nsde.fields")
        plated = any(self._sites[name]["cond_indep_stack"] for name in self._sites)
        if kind == "conjugate" or (kind == "auto" and not plated):
            try:
                check_conjugate(weights, full, args, kwargs, start)
                self._take(AutoConjugate(without_paths(self.model), weights))
                return
            except ValueError:
                if kind == "conjugate":
                    raise
        count = sum(jnp.size(self._sites[name]["value"]) for name in weights)
        if kind == "low_rank" or (count > _MAX_FLOW_WEIGHTS and not plated):
            self._take(AutoSplit(without_paths(self.model), weights))

    def _take(self, parameters: AutoGuide) -> None:
        """Make a guide that of the parameters."""
        self.parameters = parameters
        parameters.create_plates = lambda *_, **__: list(self._open.values())

    def _free_sizes(self, values: Mapping[str, Array]) -> dict[str, int]:
        """Numbers of unconstrained coordinates of sites."""
        return {
            name: jnp.size(biject_to(self._sites[name]["fn"].support).inv(jnp.asarray(value)))
            for name, value in values.items()
        }

    def _find_mode(
        self, full: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[dict[str, Array], dict[tuple[str, ...], Array]]:
        """The mode with the paths integrated out, and the covariance there, unconstrained.

        Nothing where it cannot be found beforehand.
        """
        with outside_all_handlers():
            try:
                found, constrain = approximate_mode(full, args, kwargs, jax.random.key(0))
            except (ValueError, TypeError, jax.errors.JAXTypeError):
                return {}, {}
            values = constrain(*args, **kwargs)(found.z)
        if is_traced(values):
            return {}, {}
        covariance = {tuple(sorted(found.z)): found.factor @ found.factor.T}
        return {name: value for name, value in values.items() if name in self._sites}, covariance

    def _shared_vector(self, values: Mapping[str, Array]) -> Float[Array, " theta"]:
        """Parameters outside every plate, unconstrained, as one vector; empty if too long."""
        parts = []
        for name in sorted(self._sites):
            site = self._sites[name]
            if not site["cond_indep_stack"] and name in values:
                free = biject_to(site["fn"].support).inv(jnp.asarray(values[name]))
                parts.append(jnp.ravel(free).astype(jnp.result_type(float)))
        theta = jnp.concatenate([jnp.zeros(0), *parts])
        return theta if theta.size <= _MAX_THETA else theta[:0]

    def sample_posterior(
        self,
        rng_key: PRNGKeyArray,
        params: Mapping[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw parameters and paths.

        Args:
            rng_key: key.
            params: fitted parameters, as `SVI.get_params` gives them.
            *args: arguments of the model; those of the first call if there are none.
            sample_shape: leading shape of the draws.
            **kwargs: keyword arguments of the model.
        """
        if not args and not kwargs:
            args, kwargs = self._data

        keys = jax.random.split(rng_key, int(np.prod(sample_shape, dtype=int)))
        drawn = self._compiled_draws(args, kwargs)(dict(params), keys)
        return {k: jnp.reshape(v, sample_shape + v.shape[1:]) for k, v in drawn.items()}

    def _compiled_draws(self, args: Any, kwargs: Any) -> Callable[..., Any]:
        """`draws(params, keys)`, kept for the arguments of the last call."""
        leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
        held = tuple(Held(np.asarray(a) if isinstance(a, jax.Array) else a) for a in leaves)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        key = None if traced else (treedef, held)
        if key is not None and self._draws is not None and self._draws[0] == key:
            return self._draws[1]

        def draws(params: dict[str, Any], keys: PRNGKeyArray) -> dict[str, Array]:
            def draw(key: PRNGKeyArray) -> dict[str, Array]:
                with block(), seed(rng_seed=key), substitute(data=params):
                    return self(*args, **kwargs)

            return jax.lax.map(draw, keys, batch_size=min(len(keys), _BATCH))

        compiled = entry_point(draws)
        if key is not None:
            self._draws = key, compiled
        return compiled

    def median(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """Median of each parameter and of each path at each time; see `quantiles`."""
        return {name: value[0] for name, value in self.quantiles(params, [0.5]).items()}

    def quantiles(self, params: Mapping[str, Any], quantiles: Any) -> dict[str, Array]:
        """Quantiles of each parameter and each path at each time, from a fixed set of draws.

        Args:
            params: fitted parameters.
            quantiles: probabilities, `(Q,)`.

        Returns:
            For each site an array with a new leading axis of length Q. The standard error is that
            of 4,000 draws, 0.02 sd at the median.
        """
        drawn = self.sample_posterior(jax.random.key(0), params, sample_shape=(_QUANTILE_DRAWS,))
        probabilities = jnp.asarray(quantiles)
        return {k: jnp.quantile(v, probabilities, axis=0) for k, v in drawn.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": {}, "_draws": None}
