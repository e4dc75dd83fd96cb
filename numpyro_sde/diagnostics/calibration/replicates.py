"""One replicate of a simulation-based calibration: simulate, fit, rank.

Everything that another process needs is in a :class:`Recipe`, pickled once; each process builds
one :class:`Replicator` from it, so that whatever compiles does so once for each process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer.util import log_density

from numpyro_sde.diagnostics.compare.draws import complete_draws, flatten_draws, read_fit
from numpyro_sde.diagnostics.compare.sites import is_latent, is_observation, law_times
from numpyro_sde.runtime.executors import unpacked_once

LOG_JOINT = "log_joint"
_NO_LAG = 4  # fewer draws in a chain have no autocorrelation to speak of


class Recipe(NamedTuple):
    """What to replicate; arguments as for `sbc`.

    Attributes:
        model: The model.
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        fit: The function of a key and data.
        data: Observation site to keyword argument of the model.
        var_names: Sites to rank, None for all latent ones.
        quantities: Further test quantities by name.
        log_joint: Whether to rank the log joint density.
        max_size: Largest site that is ranked whole.
        num_path_times: At how many times a path is ranked.
        num_ranks: Largest number of draws that a rank counts.
        independent: Whether draws are taken as independent.
        num_samples: Draws from a guide that `fit` returns.
        key_data: The random key's numbers.
        key_impl: Its generator.
        x64: Whether to work in float64.

    Example:
        >>> Recipe._fields[:4]
        ('model', 'model_args', 'model_kwargs', 'fit')
    """

    model: Callable[..., Any]
    model_args: tuple[Any, ...]
    model_kwargs: Mapping[str, Any]
    fit: Callable[..., Any]
    data: Mapping[str, str]
    var_names: tuple[str, ...] | None
    quantities: Mapping[str, Callable[..., Any]]
    log_joint: bool
    max_size: int
    num_path_times: int
    num_ranks: int
    independent: bool
    num_samples: int
    key_data: np.ndarray
    key_impl: str
    x64: bool

    def key(self, index: int) -> PRNGKeyArray:
        """The key of a replicate, whichever process runs it."""
        key = jax.random.wrap_key_data(jnp.asarray(self.key_data), impl=self.key_impl)
        return jax.random.fold_in(key, index)


class Outcome(NamedTuple):
    """What one replicate gave, an entry for each quantity; NaN for one without draws.

    Attributes:
        replicate: Its number.
        pit: Where the truth lies among the draws, uniform on [0, 1) if all is right.
        truth: The true values.
        mean: Posterior means.
        sd: Posterior standard deviations.
        num_kept: Draws that the rank counted, after thinning.
        error: What went wrong; empty if nothing did.

    Example:
        >>> empty = np.full(1, np.nan)
        >>> Outcome(3, empty, empty, empty, empty, empty, "ValueError: no").error
        'ValueError: no'
    """

    replicate: int
    pit: Float[np.ndarray, " Q"]
    truth: Float[np.ndarray, " Q"]
    mean: Float[np.ndarray, " Q"]
    sd: Float[np.ndarray, " Q"]
    num_kept: Float[np.ndarray, " Q"]
    error: str


class Replicator:
    """Runs replicates of a recipe.

    Args:
        recipe: What to replicate.

    Raises:
        ValueError: If the model has no observation site to simulate, has a bare `factor`, or a
            name is unknown.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> def fit(key, data):
        ...     return {"a": data["y"] / 2 + np.sqrt(0.5) * jax.random.normal(key, (100,))}
        >>> key = np.asarray(jax.random.key_data(jax.random.key(0)))
        >>> recipe = Recipe(model, (), {}, fit, {"y": "y"}, None, {}, False, 50, 3, 20, True, 100,
        ...     key, "threefry2x32", False)
        >>> 0.0 <= float(Replicator(recipe).run(0).pit[0]) < 1.0
        True
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with jax.enable_x64(recipe.x64):
            self._read_model()
        self._simulate = jax.jit(self._one_simulation)
        self._evaluate = jax.jit(self._evaluate_all)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the scalar quantities."""
        elements = [f"{name}{place}" for name, chosen in self._elements.items() for place in chosen]
        extra = [LOG_JOINT] if self.recipe.log_joint else []
        return (*elements, *self.recipe.quantities, *extra)

    def run(self, index: int) -> Outcome:
        """One replicate; an exception becomes the outcome's `error`."""
        with jax.enable_x64(self.recipe.x64):
            try:
                return self._run(index)
            except Exception as error:  # one bad replicate must not lose the others
                nothing = np.full(len(self.labels), np.nan)
                text = f"{type(error).__name__}: {error}"
                return Outcome(index, nothing, nothing, nothing, nothing, nothing, text)

    def run_all(self, indices: Sequence[int]) -> list[Outcome]:
        """Several replicates, one after the other."""
        return [self.run(index) for index in indices]

    def simulate(self, index: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """True values of the sites and simulated data of a replicate."""
        with jax.enable_x64(self.recipe.x64):
            return self._simulate(jax.random.split(self.recipe.key(index), 3)[0])

    def _read_model(self) -> None:
        recipe = self.recipe
        seeded = handlers.seed(recipe.model, jax.random.key(0))
        trace = handlers.trace(seeded).get_trace(*recipe.model_args, **recipe.model_kwargs)
        for name, site in trace.items():
            if site["type"] == "sample" and isinstance(site["fn"], dist.Unit):
                raise ValueError(
                    f"model has the bare factor {name!r}, so running it does not draw from its "
                    "prior: give sbc the model without reparametrisation, and let fit use another"
                )
        data = recipe.data or {n: n for n, site in trace.items() if is_observation(site)}
        unknown = [n for n in data if n not in trace or trace[n]["type"] != "sample"]
        if unknown or not data:
            raise ValueError(
                f"data must name observation sites of the model, whose sites are {list(trace)}; "
                f"got {list(data)}. The model called without data shows none: name them"
            )
        self._data = dict(data)
        # The argument says more than the site, whose value a model may have filled in.
        given = {n: recipe.model_kwargs.get(argument) for n, argument in data.items()}
        recorded = {n: trace[n]["value"] for n in data if trace[n]["is_observed"]} | {
            n: value
            for n, value in given.items()
            if value is not None and np.shape(value) == np.shape(trace[n]["value"])
        }
        self._missing = {
            name: np.isnan(np.asarray(value, float)) for name, value in recorded.items()
        }
        self._latent = [n for n, site in trace.items() if is_latent(site) and n not in data]
        wanted = self._latent if recipe.var_names is None else list(recipe.var_names)
        if bad := [n for n in wanted if n not in trace or n in data]:
            raise ValueError(f"var_names has {bad}, but the model's sites are {list(trace)}")
        self._elements = {name: _places(trace[name], recipe) for name in wanted}
        kept = {name for name, site in trace.items() if site["type"] == "deterministic"}
        self._kept = {*self._latent, *kept, *wanted}

    def _one_simulation(self, key: PRNGKeyArray) -> tuple[dict[str, Array], dict[str, Array]]:
        recipe = self.recipe
        model = handlers.uncondition(handlers.seed(recipe.model, key))
        trace = handlers.trace(model).get_trace(*recipe.model_args, **recipe.model_kwargs)
        truth = {name: trace[name]["value"] for name in trace if name in self._kept}
        data = {name: jnp.asarray(trace[name]["value"]) for name in self._data}
        for name, missing in self._missing.items():
            if missing.any():
                data[name] = jnp.where(missing, jnp.nan, data[name])
        return truth, data

    def _run(self, index: int) -> Outcome:
        recipe = self.recipe
        key_prior, key_fit, key_draws = jax.random.split(recipe.key(index), 3)
        truth, data = self._simulate(key_prior)
        fitted = read_fit(recipe.fit(key_fit, dict(data)))
        if fitted.guide is not None:
            fitted = complete_draws(
                fitted,
                num_samples=recipe.num_samples,
                rng_key=key_draws,
                log_likelihood=False,
                num_times=None,
            )
        posterior = fitted.posterior
        if recipe.var_names is not None and (
            lost := [name for name in recipe.var_names if name not in posterior]
        ):
            raise ValueError(f"var_names has {lost}, but fit returned draws of {list(posterior)}")
        pairs = self._pairs(truth, data, posterior)
        random = np.random.default_rng([index, *np.asarray(recipe.key_data).ravel().tolist()])
        exact = recipe.independent or fitted.method == "variational"
        for label, (true, values) in zip(self.labels, pairs, strict=True):
            bad = 0 if values is None else int(np.sum(~np.isfinite(values)))
            if bad or not np.isfinite(true):
                raise FloatingPointError(f"{label}: truth {true:g}, {bad} draws not finite")
        rows = [rank_truth(true, draws, recipe.num_ranks, exact, random) for true, draws in pairs]
        pit, true, mean, sd, kept = np.array(rows).T
        return Outcome(index, pit, true, mean, sd, kept, "")

    def _pairs(
        self, truth: Mapping[str, Any], data: Mapping[str, Any], posterior: Mapping[str, Any]
    ) -> list[tuple[float, np.ndarray | None]]:
        """Truth and draws, `(chain, draw)`, of each quantity in the order of the labels."""
        pairs: list[tuple[float, np.ndarray | None]] = []
        for name, places in self._elements.items():
            true = np.asarray(truth[name])
            draws = posterior.get(name)
            if draws is not None and draws.shape[2:] != true.shape:
                raise ValueError(
                    f"fit returned draws of {name!r} with shape {draws.shape[2:]} each, the model "
                    f"has {true.shape}"
                )
            for element in places.values():
                pairs.append(
                    (float(true[element]), None if draws is None else draws[(..., *element)])
                )
        if not (self.recipe.quantities or self.recipe.log_joint):
            return pairs
        shared = {name: np.asarray(truth[name]) for name in truth if name in posterior}
        if self.recipe.log_joint and (lost := [n for n in self._latent if n not in shared]):
            raise ValueError(
                f"log_joint needs draws of all latent sites, fit returned none of {lost}: give the "
                "model with the path integrated out, or return draws of it"
            )
        flat = flatten_draws({name: posterior[name] for name in shared})
        # The truth goes through the same program as the draws, in front of them.
        joined = {name: np.concatenate([shared[name][None], flat[name]]) for name in shared}
        values = self._evaluate(joined, data)
        shape = next(iter(posterior.values())).shape[:2]
        for name in (*self.recipe.quantities, *([LOG_JOINT] if self.recipe.log_joint else [])):
            value = np.asarray(values[name], np.float64)
            pairs.append((float(value[0]), value[1:].reshape(shape)))
        return pairs

    def _evaluate_all(
        self, values: Mapping[str, Array], data: Mapping[str, Array]
    ) -> dict[str, Array]:
        recipe = self.recipe

        def one(value: Mapping[str, Array]) -> dict[str, Array]:
            out = {name: f(value, data) for name, f in recipe.quantities.items()}
            if recipe.log_joint:
                latent = {name: value[name] for name in self._latent}
                given = {argument: data[name] for name, argument in self._data.items()}
                kwargs = {**recipe.model_kwargs, **given}
                out[LOG_JOINT] = log_density(recipe.model, recipe.model_args, kwargs, latent)[0]
            return out

        return jax.lax.map(one, values, batch_size=64)


def _places(site: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Which elements of a site are ranked: all of a small one, a path's at few times."""
    shape = np.shape(site["value"])
    times = law_times(site["fn"]) if site["type"] == "sample" else None
    if times is not None:
        axis = len(shape) - site["fn"].event_dim
        length = shape[axis]
        steps = min(recipe.num_path_times, length)
        # The last time in; the first, often known best or not at all, only with all others.
        chosen = length - 1 - np.arange(steps)[::-1] * length // steps
        rest = shape[:axis] + shape[axis + 1 :]
        elements = [
            (*other[:axis], int(t), *other[axis:]) for other in np.ndindex(rest) for t in chosen
        ]
    else:
        elements = list(np.ndindex(shape))
    if len(elements) > recipe.max_size:
        keep = np.linspace(0, len(elements) - 1, recipe.max_size).round().astype(int)
        elements = [elements[i] for i in np.unique(keep)]
    if times is None or times.ndim > 1:
        return {f"[{', '.join(map(str, e))}]" if e else "": e for e in elements}

    def place(element: tuple[int, ...]) -> str:
        parts = [f"time={times[i]:.6g}" if k == axis else str(i) for k, i in enumerate(element)]
        return f"[{', '.join(parts)}]"

    return {place(element): element for element in elements}


def rank_truth(
    truth: float,
    draws: np.ndarray | None,
    num_ranks: int,
    independent: bool,
    random: np.random.Generator,
) -> tuple[float, float, float, float, float]:
    """PIT, truth, mean, sd of the draws, and how many of them the rank counted.

    Draws are thinned, evenly, to their effective size. A rank among M draws, spread evenly over
    its share of [0, 1), is uniform for any M: ranks of replicates that mixed unequally join.

    Args:
        truth: The true value.
        draws: Draws, `(chain, draw)`, or None.
        num_ranks: Largest number of them to count.
        independent: Whether they are independent.
        random: Breaks ties.

    Example:
        >>> draws = np.linspace(-1.0, 1.0, 100)[None]
        >>> pit, *_, kept = rank_truth(0.0, draws, 31, True, np.random.default_rng(0))
        >>> 0.45 < pit < 0.55, kept
        (True, 31.0)
    """
    if draws is None:
        return np.nan, truth, np.nan, np.nan, np.nan
    draws = np.asarray(draws, np.float64)
    flat = draws.ravel()
    size = float(flat.size)
    if not independent and draws.shape[1] >= _NO_LAG and np.ptp(flat) > 0:
        size = min(size, float(effective_sample_size(draws)))
    kept = int(max(1, min(num_ranks, size)))
    thinned = flat[np.linspace(0, flat.size - 1, kept + 2)[1:-1].round().astype(int)]
    below, ties = int(np.sum(thinned < truth)), int(np.sum(thinned == truth))
    rank = below + int(random.integers(0, ties + 1))
    pit = (rank + random.uniform()) / (kept + 1)
    return pit, truth, float(flat.mean()), float(flat.std(ddof=1)), float(kept)


def run_packed(packed: bytes, indices: Sequence[int]) -> list[Outcome]:
    """Run replicates of a pickled recipe; what another process is handed.

    Example:
        >>> run_packed(b"", [])
        []
    """
    return unpacked_once(Replicator, packed).run_all(indices) if indices else []
