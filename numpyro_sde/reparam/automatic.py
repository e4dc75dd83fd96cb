"""Choose the treatment of each path from the model's structure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
from numpyro.handlers import block, seed, trace
from numpyro.infer.util import log_density

from numpyro_sde.filters import AbstractFilter, Forward, Kalman
from numpyro_sde.handlers import marginalize, observed_paths
from numpyro_sde.models.stack import path_law
from numpyro_sde.reparam.guided import GuidedReparam
from numpyro_sde.reparam.path import InnovationReparam

# Up to so many, importance sampling and random walks over particle filters do.
_FEW_PARAMETERS = 8

Treatment = Literal["observed", "integrated out", "guided", "whitened", "centred"]


class auto:  # noqa: N801
    """The model with each path treated as its structure asks.

    | the path | its treatment |
    | --- | --- |
    | observed directly, or conditioned on inside the model | left as it is |
    | linear and Gaussian, with all its observations | integrated out, `Kalman()` |
    | of a Markov jump process, with all its observations | integrated out, `Forward()` |
    | observed through `observe` | guided, `GuidedReparam()` |
    | not observed | whitened, `InnovationReparam()` |
    | of a scheme that is no map of normal innovations | left centred |

    The choice is made at each run from the arguments, by tracing alone: a model without data has
    nothing to be guided by. `engine(*args)` names the sampler that goes with it. A path that is
    integrated out is not among the posterior draws;
    `nsde.smooth(model, draws, ..., method=nsde.filters.Kalman())` draws it, or `Forward()`.

    Args:
        fn: the model.
        integrate: False leaves linear paths latent (guided, which is exact for them too).

    Raises:
        TypeError: `fn` is no function.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     well = nsde.processes.DoubleWell(1.0, 1.0, 0.5)
        ...     v = numpyro.sample("v", nsde.SDEPath(well, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        ...     nsde.observe("u", v, lambda t, v: dist.Normal(v, 0.1), obs=y)
        >>> nsde.reparam.auto(model).treatments(np.zeros(4))
        {'x': 'integrated out', 'v': 'guided'}
    """

    def __init__(self, fn: Callable[..., Any], *, integrate: bool = True) -> None:
        if not callable(fn):
            raise TypeError(f"auto needs the model, a function, got {type(fn).__name__}")
        self.fn, self.integrate = fn, integrate
        self._guide = GuidedReparam()
        self._whole: set[str] = set()
        self._wrapped: dict[frozenset[tuple[str, str]], Callable[..., Any]] = {}
        functools.update_wrapper(self, fn, updated=[])

    def treatments(self, *args: Any, **kwargs: Any) -> dict[str, Treatment]:
        """The treatment of each path site, for these arguments of the model."""
        seen = observed_paths(self.fn, args, kwargs)
        found: dict[str, Treatment] = {}
        innovations: dict[str, bool] = {}
        whole = self._whole = set[str]()

        def run() -> int:
            with block(), trace() as sites, seed(rng_seed=0):
                self.fn(*args, **kwargs)
            for name, site in sites.items():
                path = path_law(site.get("fn"))
                if path is None:
                    continue
                if path.whole_states:
                    whole.add(name)
                innovations[name] = path.scheme.has_innovations and path.scheme.smooth
                found[name] = "observed" if site["is_observed"] else "whitened"
            return 0

        jax.eval_shape(run)
        for name, treatment in found.items():
            if treatment == "observed":
                continue
            chosen = (self.integrate or name in whole) and name in seen
            if chosen and self._takes(self._method(name in whole), name, args, kwargs):
                found[name] = "integrated out"
            elif not innovations[name]:
                found[name] = "centred"
            elif name in seen:
                found[name] = "guided"
        return found

    def engine(self, *args: Any, **kwargs: Any) -> str:
        """Which sampler to begin with for these arguments, and which to check it by, in words.

        From the structure alone, nothing is run: whether the guide of a guided path covers its
        posterior is found by `diagnostics.guide_quality`, and in the verdicts of `compare_fits`.

        Example:
            >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
            >>> def model(y=None):
            ...     v = nsde.processes.DoubleWell(1.0, 1.0, numpyro.sample("s", dist.Exponential()))
            ...     x = numpyro.sample("x", nsde.SDEPath(v, np.arange(4.0), dist.Normal(0.0, 1.0)))
            ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
            >>> nsde.reparam.auto(model).engine(np.zeros(4))[:37]
            'infer.SplitNUTS; where the guide cove'
        """
        chosen = self.treatments(*args, **kwargs)
        if "guided" not in chosen.values():
            whitened = "whitened" in chosen.values()
            return "infer.SplitNUTS" if whitened else "numpyro.infer.NUTS"
        sizes: list[int] = []

        def run() -> int:
            with block(), trace() as sites, seed(rng_seed=0):
                self.fn(*args, **kwargs)
            for name, site in sites.items():
                if site["type"] == "sample" and not site["is_observed"] and name not in chosen:
                    sizes.append(math.prod(jnp.shape(site["value"])))
            return 0

        jax.eval_shape(run)
        few = sum(sizes) <= _FEW_PARAMETERS
        other = "infer.PMMH and nsde.evidence" if few else "infer.Tempered"
        return (
            "infer.SplitNUTS; where the guide covers little of a path's posterior (several modes, "
            f"strong nonlinearity), {other} on the model"
            + (" itself, or infer.Tempered on this one" if few else ", believed by its round trips")
        )

    def _method(self, whole: bool) -> AbstractFilter:
        return Forward() if whole else Kalman()

    def _takes(self, method: AbstractFilter, name: str, args: Any, kwargs: Any) -> bool:
        marginal = marginalize(self.fn, method=method, sites=[name])

        def run() -> Any:
            with block():
                return log_density(seed(marginal, 0), args, kwargs, {})[0]

        try:
            jax.eval_shape(run)
        except (TypeError, ValueError):  # not linear, or its value is used outside `observe`
            return False
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.treatments(*args, **kwargs)
        key = frozenset(chosen.items())
        if key not in self._wrapped:
            # Kept, so that the guide's plug-in parameters are searched for once.
            self._wrapped[key] = self._wrap(chosen)
        return self._wrapped[key](*args, **kwargs)

    def _wrap(self, chosen: dict[str, Treatment]) -> Callable[..., Any]:
        model = self.fn
        integrated = {name for name, t in chosen.items() if t == "integrated out"}
        for whole, names in ((False, integrated - self._whole), (True, integrated & self._whole)):
            if names:
                model = marginalize(model, method=self._method(whole), sites=sorted(names))
        config: dict[str, Any] = {
            name: self._guide if treatment == "guided" else InnovationReparam()
            for name, treatment in chosen.items()
            if treatment in ("guided", "whitened")
        }
        return numpyro.handlers.reparam(model, config=config) if config else model
