"""The same fit to the data up to a time, compiled once for all times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.infer import HMC, MCMC
from numpyro.primitives import Messenger

from numpyro_sde.diagnostics.calibration.compiled import compiled_chain
from numpyro_sde.diagnostics.compare.sites import law_times, unwrap
from numpyro_sde.distributions.path_law import AbstractPathLaw

Refit = Callable[[Callable[..., Any]], Callable[..., Mapping[str, Any]]]


def until(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[ArrayLike], None]:
    """The model of the data up to a time, its one argument; later data are missing.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     x = numpyro.sample("x", nsde.SDEPath(
        ...         nsde.SDE(lambda t, x: -x, lambda t, x: 1.0), np.arange(3.0), 0.0))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 1.0), obs=y)
        >>> early = numpyro.handlers.seed(until(model, (np.ones(3),), {}), 0)
        >>> numpyro.handlers.trace(early).get_trace(1.5)["y"]["value"].tolist()
        [1.0, 1.0, nan]
    """

    def truncated(cutoff: ArrayLike) -> None:
        with _HideLater(cutoff):
            model(*args, **kwargs)

    return truncated


class _HideLater(Messenger):
    """Turns data after a time into missing ones."""

    def __init__(self, cutoff: ArrayLike) -> None:
        self.cutoff = cutoff
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        times = law_times(msg["fn"])
        if times is None:
            return
        if isinstance(unwrap(msg["fn"]), AbstractPathLaw):
            # A path cannot miss a state; its density is a product, and stops at the time.
            msg["fn"] = _PathUntil(msg["fn"], jnp.asarray(times <= self.cutoff))
            return
        value = jnp.asarray(msg["value"], float)
        beyond = len(unwrap(msg["fn"]).event_shape) - 1
        known = jnp.asarray(times <= self.cutoff)
        known = known.reshape(*known.shape, *(1,) * beyond)
        msg["value"] = jnp.where(known, value, jnp.nan)


class _PathUntil(dist.Distribution):
    """An observed path whose later states are left out."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("path", "known")

    def __init__(self, path: Any, known: Array) -> None:
        self.path, self.known = path, known
        super().__init__(path.batch_shape, path.event_shape)

    @property
    def support(self) -> Any:
        return self.path.support

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        terms = unwrap(self.path).log_prob_pointwise(value)
        total = jnp.sum(jnp.where(self.known, terms, 0.0), axis=-1)
        return jnp.broadcast_to(total, jnp.broadcast_shapes(total.shape, self.batch_shape))

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.path.sample(key, sample_shape)


def default_refit(fit: Any) -> Refit:
    """How to run a fit's engine again: NUTS and HMC with the settings of the fit.

    Raises:
        ValueError: If the fit is no `MCMC`, or has another kernel.
    """
    if not isinstance(fit, MCMC) or not isinstance(fit.sampler, HMC):
        what = type(fit.sampler).__name__ if isinstance(fit, MCMC) else type(fit).__name__
        raise ValueError(
            "lfo fits the model again, which it can do by itself for an MCMC with NUTS or HMC, not "
            f"for {what}: give refit=, such as "
            "lambda model: compiled_chain(kernel(model), 300, 300)"
        )
    number = fit.num_samples * fit.num_chains

    def make(model: Callable[..., Any]) -> Callable[..., Mapping[str, Any]]:
        kernel = _on_model(fit.sampler, model)
        run = compiled_chain(kernel, fit.num_warmup, number, thinning=fit.thinning)
        return lambda key, cutoff: jax.tree.map(np.asarray, run(key, cutoff))

    return make


def _on_model(kernel: HMC, model: Callable[..., Any]) -> HMC:
    """A kernel with the settings of another, for another model, not yet started."""
    new = copy.copy(kernel)
    new._model = model
    for name in ("_init_fn", "_potential_fn_gen", "_postprocess_fn", "_sample_fn"):
        setattr(new, name, None)
    new._potential_fn = None
    return new
