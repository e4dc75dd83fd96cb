"""A maximum likelihood fit: the estimate, its likelihood, and how both were found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_sde.describe import html_text
from numpyro_sde.infer.parameter_space import ParameterSpace
from numpyro_sde.infer.profile import Profile


def log_mean_exp(values: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """Log of the mean of likelihoods given by their logarithms, and its jackknife error.

    Example:
        >>> import numpy as np
        >>> value, error = log_mean_exp(np.log([1.0, 2.0, 3.0]))
        >>> round(value, 4), round(error, 2)
        (0.6931, 0.3)
    """
    top = np.max(values)
    if not np.isfinite(top):
        return float(top), float("inf")
    weights, count = np.exp(values - top), values.size
    mean = float(top + np.log(np.mean(weights)))
    with np.errstate(divide="ignore"):
        others = top + np.log((np.sum(weights) - weights) / (count - 1))
    spread = (count - 1) / np.sqrt(count) * np.std(others, ddof=1)
    return mean, float(spread) if np.isfinite(spread) else float("inf")


@dataclass(frozen=True)
class LikelihoodFit:
    """What `infer.IteratedFiltering` returns; `compare_fits` sets it beside posteriors.

    Attributes:
        params: the estimate of the best start, by site on its own scale.
        log_likelihood: log likelihood there, by independent plain filters.
        standard_error: its Monte Carlo error.
        starts: estimates of all starts by site, the leading axis over starts.
        log_likelihoods: log likelihood at each, `(S,)`.
        standard_errors: their Monte Carlo errors, `(S,)`.
        trace: by site the mean of the swarm before the first pass and after each, leading axes
            over passes and starts.
        trace_log_likelihood: log likelihood of the perturbed model in each pass, `(I, S)`.
        trace_points: the trace as unconstrained vectors, `(I + 1, S, D)`.
        swarm: where the search stands, unconstrained, `(S, D, M)`: `resume` goes on from it.
        num_iterations: passes so far.
        model: the model.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments.
        profiles: profiles that were found for it, by site.

    Example:
        >>> import numpyro_sde as nsde
        >>> sorted(nsde.infer.LikelihoodFit.__dataclass_fields__)[:2]
        ['log_likelihood', 'log_likelihoods']
    """

    params: dict[str, np.ndarray]
    log_likelihood: float
    standard_error: float
    starts: dict[str, np.ndarray]
    log_likelihoods: Float[np.ndarray, " S"]
    standard_errors: Float[np.ndarray, " S"]
    trace: dict[str, np.ndarray]
    trace_log_likelihood: Float[np.ndarray, "I S"]
    trace_points: Float[np.ndarray, "I+1 S D"]
    swarm: Float[np.ndarray, "S D M"]
    num_iterations: int
    model: Callable[..., Any]
    model_args: tuple[Any, ...]
    model_kwargs: Mapping[str, Any]
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    def with_profiles(self, *profiles: Profile) -> LikelihoodFit:
        """The fit with profiles, whose errors and intervals it then carries into `compare_fits`."""
        return replace(self, profiles={**self.profiles, **{p.site: p for p in profiles}})

    @classmethod
    def of(
        cls,
        space: ParameterSpace,
        values: np.ndarray,
        errors: np.ndarray,
        means: Sequence[np.ndarray],
        perturbed: Sequence[np.ndarray],
        swarm: np.ndarray,
        num_iterations: int,
    ) -> LikelihoodFit:
        """Gather a fit from unconstrained points."""
        points = np.stack(means)
        constrain = jax.jit(jax.vmap(jax.vmap(space.constrain)))
        trace = {n: np.asarray(v) for n, v in constrain(jnp.asarray(points)).items()}
        best = int(np.argmax(values))
        return cls(
            {name: value[-1, best] for name, value in trace.items()},
            float(values[best]),
            float(errors[best]),
            {name: value[-1] for name, value in trace.items()},
            values,
            errors,
            trace,
            np.stack(perturbed),
            points,
            swarm,
            num_iterations,
            space.model,
            space.args,
            space.kwargs,
        )

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        head = (
            f"log likelihood {self.log_likelihood:.3f} (se {self.standard_error:.3f}) after "
            f"{self.num_iterations} passes, best of {len(self.log_likelihoods)} starts"
        )
        rows = []
        for name, value in self.params.items():
            among = np.std(self.starts[name], axis=0)
            for element in np.ndindex(value.shape):
                label = f"{name}{list(element) if element else ''}"
                rows.append(f"{label:<24}{value[element]:>12.5g}{among[element]:>14.3g}")
        return "\n".join([head, f"{'':<24}{'estimate':>12}{'sd of starts':>14}", *rows])
