"""`fit_natural`: natural-gradient steps of the path's law, alternating with the bound."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import block, seed, substitute
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.path_laws import GaussianMarkovPath
from numpyro_sde.guides.training import compiled_steps


def fit_natural(
    svi: SVI,
    rng_key: PRNGKeyArray,
    num_rounds: int,
    *args: Any,
    natural_steps: int = 10,
    svi_steps: int = 100,
    init_state: SVIState | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIRunResult:
    """Alternate between natural-gradient steps of the path's law and the bound.

    Each round improves the law of the path at the parameters' median, by steps that are exact
    where the model is linear and Gaussian and use no random number elsewhere (the conjugate update
    of SING), and then raises the bound in all parameters by SVI. Where the parameters are known,
    one round with `svi_steps=0` is the whole fit: some ten steps in the place of thousands.

    Args:
        svi: with a guide `AutoPathGuide(model, path=GaussianMarkovPath())`.
        rng_key: key.
        num_rounds: rounds.
        *args: arguments of model and guide.
        natural_steps: steps of natural gradient in a round.
        svi_steps: steps of SVI in a round.
        init_state: state to go on from.
        progress_bar: show progress.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Parameters, state and the losses: of each round the negative bounds of the path at the
        parameters' median, before each natural step and after the last, where there are no steps
        of SVI; else those of SVI.

    Raises:
        TypeError: a guide with another law.
        ValueError: a count out of range. In use: a first state that is neither known nor normal,
            noise with a memory, several paths, a subsampled plate.

    Source: Khan and Lin (2017), "Conjugate-computation variational inference"; Hu, Smith and
    Linderman (2025), "SING: SDE inference via natural gradients".

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.guides import AutoPathGuide, fit_natural
        >>> def model(y):
        ...     sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(-1.0, 0.1)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> svi = numpyro.infer.SVI(
        ...     model, AutoPathGuide(model), numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO())
        >>> y = jax.numpy.array([-0.9, -1.2, -1.0])
        >>> fit = fit_natural(
        ...     svi, jax.random.key(0), 1, y, natural_steps=3, svi_steps=0, progress_bar=False)
        >>> bool(fit.losses[-1] <= fit.losses[0])
        True
    """
    guide = svi.guide
    if not (isinstance(guide, AutoPathGuide) and isinstance(guide.path, GaussianMarkovPath)):
        raise TypeError(
            "fit_natural needs the guide AutoPathGuide(model, path=GaussianMarkovPath()), got "
            f"{type(guide).__name__}"
        )
    at_least("num_rounds", num_rounds, 1)
    at_least("natural_steps", natural_steps, 1)
    at_least("svi_steps", svi_steps, 0)
    init_key, rng_key = jax.random.split(rng_key)
    state = svi.init(init_key, *args, **kwargs) if init_state is None else init_state

    def path_step(params: Any, theta: Any, key: PRNGKeyArray) -> Any:
        with block(), seed(rng_seed=key), substitute(data={**params, **theta}):
            return guide.natural_update(natural_steps, args, kwargs)

    compiled_path, compiled_svi = jax.jit(path_step), compiled_steps(svi, svi_steps, args, kwargs)
    losses: list[np.ndarray] = []
    with tqdm.trange(num_rounds, disable=not progress_bar) as bar:
        for _ in bar:
            rng_key, key = jax.random.split(rng_key)
            params = svi.get_params(state)
            new, bounds = compiled_path(params, _median(guide, params), key)
            # The law's parameters have no constraints, so these are the optimiser's own.
            free = svi.optim.get_params(state.optim_state) | new
            state = state._replace(optim_state=svi.optim.init(free))
            bar.set_postfix_str(f"bound of the path {float(bounds[-1]):.4g}", refresh=False)
            if svi_steps:
                state, some = compiled_svi(state)
                losses.append(np.asarray(some))
            else:
                losses.append(-np.asarray(bounds))
    return SVIRunResult(svi.get_params(state), state, jnp.asarray(np.concatenate(losses)))


def _median(guide: AutoPathGuide, params: Any) -> dict[str, Array]:
    """Medians of the parameters under their guide; nothing where the model has none."""
    if not guide.has_parameters:
        return {}
    median: dict[str, Array] = guide.parameters.median(params)
    return median
