"""Any fit as an ArviZ object, with time, state and series as coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset, make_tree
from numpyro_sde.diagnostics.compare.draws import (
    Draws,
    complete_draws,
    evaluate_model,
    flatten_draws,
    read_fit,
)
from numpyro_sde.diagnostics.compare.guide_quality import guide_of_chains
from numpyro_sde.diagnostics.compare.model_names import describe_model
from numpyro_sde.diagnostics.compare.parameter_weights import NUM_PATHS
from numpyro_sde.diagnostics.compare.path_places import find_paths
from numpyro_sde.diagnostics.compare.sites import (
    Layout,
    is_latent,
    is_observation,
    present_points,
    trace_model,
)
from numpyro_sde.diagnostics.compare.timing import Timing
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.step_check import warn_coarse_step
from numpyro_sde.models.stack import path_law
from numpyro_sde.reparam.path import is_innovation
from numpyro_sde.states.smoothing import smooth as smooth_paths
from numpyro_sde.statespace.model import AbstractFilter

_PREDICTIVE_DRAWS = 500  # for a bare `prior=True` or `posterior_predictive=True`


def to_arviz(
    fit: Any,
    *,
    times: Any = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_paths: int = NUM_PATHS,
    rng_key: PRNGKeyArray | None = None,
    prior: bool | int = False,
    posterior_predictive: bool | int = False,
    log_likelihood: bool = True,
    smooth: bool | AbstractFilter = False,
    guide_draws: int = 400,
    exclude: Iterable[str] = (),
    group_by_chain: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    timing: Timing | None = None,
) -> Any:
    """Convert a fit for ArviZ: `InferenceData` for ArviZ 0.23, `DataTree` for 1.x.

    Groups: `posterior` (always with dimensions chain and draw, for a variational fit too),
    `sample_stats` (the sampler's fields; for a variational fit `log_p` and `log_q` of each
    draw), `log_likelihood`, `observed_data`, and on request `posterior_predictive`, `prior` and
    `prior_predictive`. Plates name the batch dimensions; a path is on `time` (and `state`), an
    observation at other times on its own `time_{site}`, innovations on `time_step`. Where every
    series has its own clock, `time` counts and the times are the coordinate `time_value`.

    The log likelihood has one entry for each time of an observation site. Missing values (NaN)
    have none, so that leave-one-out counts what was recorded: times missing in every series
    are dropped; where series differ, the site is laid out along one dimension `{site}_point`
    with the coordinates of each point. It is given the latent path: PSIS-LOO of a flexible path
    often has high k-hat, and then says little. Integrate the path out for an honest number.

    Args:
        fit: An `MCMC` after `run`; a tuple `(svi, svi_result)`, `(guide, params)` or an
            :class:`SVIFit`; a :class:`RefinedFit`; or a dictionary of draws, shape
            `(draw, ...)`, or `(chain, draw, ...)` with `group_by_chain=True`. A fit by
            `AutoDelta` or `AutoLaplaceApproximation` has no `log_p` and `log_q`.
        times: Labels of the time axis, shape `(T,)` or `(*batch, T)`, numbers or dates, a
            `TimeGrid`, or what `nsde.data.as_times` or `from_long` gave, whose unit and calendar
            then label every time axis. None takes the times of the model's paths.
        model: The model; known from an `MCMC` or an `SVI`. A dictionary of draws without one
            gives `posterior` alone; with one it gains the deterministic sites that it lacks.
        model_args: Positional arguments of the fit; known from an `MCMC`.
        model_kwargs: Keyword arguments of the fit; known from an `MCMC`.
        num_samples: Draws from a guide.
        num_paths: For a guide with a method `path_sites()`, which names sites that it draws given
            its parameters: paths drawn for each of its draws, to integrate the path out of the
            weight of the parameters (`log_weight_parameters`). 1 leaves that out.
        rng_key: For draws from a guide and predictions; None is `jax.random.key(0)`.
        prior: Draw the prior and its predictions, so many times (True: 500).
        posterior_predictive: Draw predictions of the data for so many posterior draws, evenly
            thinned (True: at most 500). The data are forgotten first.
        log_likelihood: Whether to evaluate it.
        smooth: For a model fitted with `handlers.marginalize`: draw its paths given each
            posterior draw (`nsde.smooth`) and add them to `posterior`. Give the filter where
            the model is not that handler itself.
        guide_draws: For chains along paths under `GuidedReparam`: paths drawn from the guide at
            each of five posterior draws, to say how much of the path's posterior it covers
            (attributes `guide_efficiency` and `guide_khat`, which verdicts look at). 0 leaves that
            out.
        exclude: Sites to leave out of the result, such as a very long path.
        group_by_chain: Whether a dictionary of draws has a leading chain dimension.
        coords: Coordinates for dimensions by name.
        dims: For a site, names of its dimensions after chain and draw.
        timing: From :func:`timed`, kept as attributes of `posterior`.

    Raises:
        TypeError: If `fit` is of no known kind.
        ValueError: If `times` fits no site, or shapes and names disagree.
        ImportError: If ArviZ is not installed.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import to_arviz
        >>> draws = {"rate": np.ones(10), "x": np.zeros((10, 4))}
        >>> tree = to_arviz(draws, times=[0.0, 0.5, 1.0, 1.5])
        >>> tree["posterior"]["x"].dims
        ('chain', 'draw', 'time')
    """
    keys = jax.random.split(jax.random.key(0) if rng_key is None else rng_key, 6)
    key_trace, key_draws, key_prior, key_predict, key_smooth, key_guide = keys
    draws = read_fit(
        fit,
        model=model,
        model_args=model_args,
        model_kwargs=model_kwargs,
        group_by_chain=group_by_chain,
    )
    trace = _trace(draws, key_trace)
    paths = find_paths(draws.model, draws.model_args, draws.model_kwargs)
    layout = Layout(trace, times=times, dims=dims, coords=coords, paths=paths)
    draws = complete_draws(
        draws,
        num_samples=num_samples,
        num_paths=num_paths,
        rng_key=key_draws,
        log_likelihood=log_likelihood,
        num_times=layout.num_times,
        deterministic=[n for n, site in layout.trace.items() if site["type"] == "deterministic"],
    )
    if guide_draws and draws.model is not None and _is_guided(draws, trace):
        known = guide_of_chains(
            draws.model,
            draws.model_args,
            draws.model_kwargs,
            draws.posterior,
            rng_key=key_guide,
            num_draws=guide_draws,
        )
        draws = draws._replace(attributes={**draws.attributes, **known})
    builder = _Builder(layout, frozenset(exclude), _attributes(draws, timing or draws.timing))
    posterior = draws.posterior
    if smooth is not False:
        posterior = {**posterior, **_smoothed(draws, smooth, key_smooth)}
    groups = {"posterior": builder.sampled(posterior)}
    if draws.statistics:
        groups["sample_stats"] = builder.statistics(draws.statistics)
    if draws.log_likelihood:
        groups["log_likelihood"] = builder.log_likelihood(draws.log_likelihood)
    if posterior_predictive and trace is not None:
        wanted = _PREDICTIVE_DRAWS if posterior_predictive is True else int(posterior_predictive)
        groups["posterior_predictive"] = _predict(builder, draws, wanted, key_predict)
    if prior and trace is not None:
        wanted = _PREDICTIVE_DRAWS if prior is True else int(prior)
        groups["prior"], groups["prior_predictive"] = _prior(builder, draws, wanted, key_prior)
    if trace is not None and (observed := builder.observed_data()) is not None:
        groups["observed_data"] = observed
    layout.check_times_used(
        {
            str(name): tuple(n for dim, n in v.sizes.items() if dim not in ("chain", "draw"))
            for group in groups.values()
            for name, v in group.data_vars.items()
        }
    )
    return make_tree(groups)


def _trace(draws: Draws, rng_key: PRNGKeyArray) -> dict[str, Any] | None:
    if draws.model is None:
        return None
    first = {name: jnp.asarray(value[0, 0]) for name, value in draws.posterior.items()}
    values = {**draws.params, **first}
    trace = trace_model(draws.model, draws.model_args, draws.model_kwargs, values, rng_key)
    # Within a sampler all is traced; here drift and path are known, at a draw of the posterior.
    for site in trace.values():
        law = path_law(site["fn"]) if site["type"] == "sample" else None
        if isinstance(law, SDEPath):
            warn_coarse_step(law, site["value"])
    return trace


def _is_guided(draws: Draws, trace: Mapping[str, Any] | None) -> bool:
    """Whether draws are those of chains along guided paths, which see what the guide sees."""
    if draws.method != "mcmc" or draws.engine == "Tempered" or trace is None:
        return False
    innovations = (name.removesuffix("_innov") for name in draws.posterior if is_innovation(name))
    return any(f"{path}_guide" in trace for path in innovations)


def _smoothed(
    draws: Draws, method: bool | AbstractFilter, rng_key: PRNGKeyArray
) -> dict[str, np.ndarray]:
    """Draws of the paths that were integrated out, leading dimensions chain and draw."""
    if draws.model is None:
        raise ValueError("smooth= needs the model that was fitted: give model=")
    shape = next(iter(draws.posterior.values())).shape[:2]
    paths = smooth_paths(
        draws.model,
        flatten_draws(draws.posterior),
        *draws.model_args,
        method=method if isinstance(method, AbstractFilter) else None,
        rng_key=rng_key,
        **draws.model_kwargs,
    )
    return {name: np.asarray(path).reshape(*shape, *path.shape[1:]) for name, path in paths.items()}


def _attributes(draws: Draws, timing: Timing | None) -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "inference_library": "numpyro",
        "inference_library_version": numpyro.__version__,
        "method": draws.method,
        "engine": draws.engine,
        **draws.attributes,
    }
    if draws.model is not None:
        attrs["model"] = describe_model(draws.model, draws.model_args, draws.model_kwargs)
    if timing is not None:
        attrs |= timing.attributes()
    return attrs


class _Builder:
    """Makes the groups of one result out of arrays and the layout of their model."""

    def __init__(self, layout: Layout, exclude: frozenset[str], attrs: Mapping[str, Any]) -> None:
        self.layout = layout
        self.exclude = exclude
        self.attrs = attrs

    def sampled(self, values: Mapping[str, np.ndarray], draw: np.ndarray | None = None) -> Any:
        """Values of sites, leading dimensions chain and draw."""
        kept = {name: value for name, value in values.items() if name not in self.exclude}
        variables = {
            name: (("chain", "draw", *self.layout.dims_of(name, value.shape[2:])), value)
            for name, value in kept.items()
        }
        return self._dataset(variables, draw)

    def statistics(self, values: Mapping[str, np.ndarray]) -> Any:
        """Statistics of the sampler; one that is not a number for each draw is left out."""
        return self._dataset(
            {name: (("chain", "draw"), value) for name, value in values.items() if value.ndim == 2}
        )

    def log_likelihood(self, values: Mapping[str, np.ndarray]) -> Any:
        """Pointwise log densities of the data points that were recorded."""
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        extra: dict[str, Any] = {}
        for name, value in values.items():
            site = self.layout.trace[name]
            shape = np.broadcast_shapes(np.shape(site["value"]), site["fn"].shape())
            dims = self.layout.dims_of(name, shape)[: value.ndim - 2]
            # Under every draw: a single draw may hit 0 by chance.
            silent = np.where((value == 0.0).all(axis=(0, 1)), 0.0, 1.0)
            present = present_points(site, silent)
            coords = {
                label: coord if isinstance(coord, tuple) else ((label,), np.asarray(coord))
                for label, coord in self.layout.coords.items()
            }
            coords = {label: coord for label, coord in coords.items() if set(coord[0]) <= set(dims)}
            dims, value, coords = _drop_missing(name, dims, value, present, coords)
            variables[name] = (("chain", "draw", *dims), value)
            extra |= coords
        return self._dataset(variables, extra=extra)

    def observed_data(self) -> Any | None:
        """The data as given to the model, NaN where missing."""
        variables = {}
        for name, site in self.layout.trace.items():
            if is_observation(site) and name not in self.exclude:
                value = np.asarray(site["value"])
                shape = np.broadcast_shapes(value.shape, site["fn"].shape())
                variables[name] = (self.layout.dims_of(name, shape), np.broadcast_to(value, shape))
        return self._dataset(variables, sampled=False) if variables else None

    def _dataset(
        self,
        variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
        draw: np.ndarray | None = None,
        extra: Mapping[str, Any] | None = None,
        *,
        sampled: bool = True,
    ) -> Any:
        coords = {**self.layout.coords, **(extra or {})}
        if sampled and variables:
            shape = next(iter(variables.values()))[1].shape
            coords |= {"chain": np.arange(shape[0])}
            coords |= {"draw": np.arange(shape[1]) if draw is None else draw}
        dataset = make_dataset(variables, coords, self.attrs)
        for name, coordinate in dataset.coords.items():
            if str(name).startswith("time") and coordinate.dtype.kind == "f" and self.layout.unit:
                # Not `units`: xarray would read "hour" back from file as a span of time.
                coordinate.attrs["unit"] = self.layout.unit
        return dataset


def _drop_missing(
    name: str,
    dims: tuple[str, ...],
    value: np.ndarray,
    present: np.ndarray,
    coords: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
) -> tuple[tuple[str, ...], np.ndarray, dict[str, Any]]:
    """Leave missing points out, keeping the array's form if whole times are missing.

    Args:
        name: The site.
        dims: Names of the dimensions of `value` after chain and draw.
        value: Pointwise log density.
        present: Which points were recorded.
        coords: Dimensions and array of every coordinate along `dims`.
    """
    if present.all():
        return dims, value, {}
    last = present.any(axis=tuple(range(present.ndim - 1)))
    if np.array_equal(present, np.broadcast_to(last, present.shape)):
        kept = f"{dims[-1]}_observed_{name}"
        return (*dims[:-1], kept), value[..., last], {kept: coords[dims[-1]][1][last]}
    point = f"{name}_point"
    labels: dict[str, Any] = {point: np.arange(int(present.sum()))}
    index = dict(zip(dims, np.nonzero(present), strict=True))
    for label, (along, array) in coords.items():
        labels[f"{name}_{label}"] = ((point,), array[tuple(index[dim] for dim in along)])
    return (point,), value[:, :, present], labels


def _predict(builder: _Builder, draws: Draws, wanted: int, rng_key: PRNGKeyArray) -> Any:
    chains, length = next(iter(draws.posterior.values())).shape[:2]
    # A site that is computed from others may hang on the data: compute it anew.
    latent = {name: value for name, value in draws.posterior.items() if _is_random(builder, name)}
    per_chain = max(1, min(length, wanted // chains))
    chosen = np.unique(np.linspace(0, length - 1, per_chain).round().astype(int))
    flat = flatten_draws({name: value[:, chosen] for name, value in latent.items()})
    values = evaluate_model(
        draws, flat, chains * len(chosen), rng_key, _predicted, forget_data=True
    )
    shaped = {n: v.reshape(chains, len(chosen), *v.shape[1:]) for n, v in values.items()}
    return builder.sampled(shaped, draw=chosen)


def _is_random(builder: _Builder, name: str) -> bool:
    site = builder.layout.trace.get(name)
    return site is not None and is_latent(site)


def _predicted(trace: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: jnp.asarray(site["value"])
        for name, site in trace.items()
        if site["type"] == "sample"
        and site["infer"].get("was_observed", False)
        and not site["infer"].get("is_auxiliary", False)
    }


def _prior(builder: _Builder, draws: Draws, wanted: int, rng_key: PRNGKeyArray) -> tuple[Any, Any]:
    def collect(trace: Mapping[str, Any]) -> dict[str, Array]:
        predicted = _predicted(trace)
        out = {f"predicted/{name}": value for name, value in predicted.items()}
        for name, site in trace.items():
            if site["type"] == "deterministic" or (is_latent(site) and name not in predicted):
                out[f"prior/{name}"] = jnp.asarray(site["value"])
        return out

    values = evaluate_model(draws, {}, wanted, rng_key, collect, forget_data=True)
    parts = {
        prefix: builder.sampled(
            {n.removeprefix(prefix): v[None] for n, v in values.items() if n.startswith(prefix)}
        )
        for prefix in ("prior/", "predicted/")
    }
    return parts["prior/"], parts["predicted/"]
