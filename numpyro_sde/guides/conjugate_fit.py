"""`fit_conjugate`: conjugate updates of the weights of a drift, alternating with the bound."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import block, seed, substitute
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.primitives import Messenger

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.conjugate import AutoConjugate
from numpyro_sde.guides.weight_statistics import Moments, gathered, likelihood_of, no_moments

# Numbers of the regressors of the draws that are treated at once.
_TOGETHER = 2**24


class _Held(Messenger):
    """A guide some of whose parameters have given values, whatever an optimiser has for them."""

    def __init__(self, fn: Any, values: dict[str, Array]) -> None:
        super().__init__(fn)
        self.values = values

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def fit_conjugate(
    svi: SVI,
    rng_key: PRNGKeyArray,
    num_rounds: int,
    *args: Any,
    svi_steps: int = 50,
    weight_draws: int = 32,
    num_paths: int = 8,
    step_size: float = 0.1,
    init_state: SVIState | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIRunResult:
    """Alternate between conjugate updates of a learned drift's weights and the bound.

    Each round draws parameters and paths from the guide, and takes for the likelihood of the
    weights what the paths say of them, less what is not known of the paths, in closed form; then
    SVI raises the bound in all else, the law of the paths and that of amplitude and length, by
    `svi_steps` steps. No optimiser's step size has to suit the weights, and a handful of rounds is
    a fit.

    Args:
        svi: with a guide `AutoPathGuide(model, weights="conjugate")`.
        rng_key: key.
        num_rounds: rounds.
        *args: arguments of model and guide.
        svi_steps: steps of SVI in a round.
        weight_draws: draws of the parameters in an update.
        num_paths: paths drawn at each, 2 or more.
        step_size: share of new draws in the running means of the statistics, in (0, 1]: that of a
            step of natural gradient. The first draws are averaged evenly until they would have
            less.
        init_state: state to go on from; the running means begin anew.
        progress_bar: show progress and the loss.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Parameters, state and the losses of all steps of SVI; without any, none.

    Raises:
        TypeError: another guide.
        ValueError: a count or a step size out of range; in use, what the update cannot do: weights
            that are used outside of the drift of one path, a drift or a scheme that is not linear
            in them (`LocalLinear()`), noise that depends on them, several paths.

    Source: Khan and Lin (2017), "Conjugate-computation variational inference", for the update;
    Louis (1982), "Finding the observed information matrix when using the EM algorithm", for paths
    that are not seen.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.guides import AutoPathGuide, fit_conjugate
        >>> prior = nsde.fields.HSGP(dim=1, box=3.0, num=4)
        >>> def model(y):
        ...     f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=1.0)
        ...     sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(0.0, 0.5)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y)
        >>> svi = numpyro.infer.SVI(
        ...     model, AutoPathGuide(model, weights="conjugate"), numpyro.optim.Adam(1e-2),
        ...     numpyro.infer.Trace_ELBO())
        >>> y = jax.numpy.array([0.3, 0.2, -0.1])
        >>> fit = fit_conjugate(
        ...     svi, jax.random.key(0), 2, y, svi_steps=3, weight_draws=4, progress_bar=False)
        >>> fit.losses.shape, fit.params["auto_weights_root"].shape
        ((6,), (4, 4))
    """
    guide = svi.guide
    if not isinstance(guide, AutoPathGuide):
        raise _other_guide(type(guide).__name__)
    for name, count, least in (
        ("num_rounds", num_rounds, 1),
        ("svi_steps", svi_steps, 0),
        ("weight_draws", weight_draws, 1),
        ("num_paths", num_paths, 2),
    ):
        at_least(name, count, least)
    if not 0.0 < step_size <= 1.0:
        raise ValueError(f"step_size must be above 0 and at most 1, got {step_size}")
    init_key, rng_key = jax.random.split(rng_key)
    state = svi.init(init_key, *args, **kwargs) if init_state is None else init_state
    if not isinstance(guide.parameters, AutoConjugate):
        raise _other_guide(repr(guide))
    names = guide.parameters.names
    sizes = (weight_draws, num_paths, svi_steps, step_size)
    compiled = jax.jit(_round_of(svi, guide, sizes, args, kwargs))
    params = svi.get_params(state)
    held = {name: params[name] for name in names}
    moments = no_moments(*params[names[1]].shape)
    losses: list[np.ndarray] = []
    with tqdm.trange(num_rounds, disable=not progress_bar) as bar:
        for _ in bar:
            rng_key, key = jax.random.split(rng_key)
            state, held, moments, some = compiled(state, held, moments, key)
            losses.append(np.asarray(some))
            if svi_steps:
                bar.set_postfix_str(f"loss {losses[-1].mean():.4f}", refresh=False)
    # The likelihood's parameters have no constraints, so these are the optimiser's own.
    free = svi.optim.get_params(state.optim_state) | held
    state = state._replace(optim_state=svi.optim.init(free))
    return SVIRunResult(svi.get_params(state), state, jnp.asarray(np.concatenate(losses)))


def _other_guide(found: str) -> TypeError:
    return TypeError(
        f'fit_conjugate needs the guide AutoPathGuide(model, weights="conjugate"), got {found}'
    )


def _round_of(
    svi: SVI, guide: AutoPathGuide, sizes: tuple[int, int, int, float], args: Any, kwargs: Any
) -> Any:
    """One round: state, likelihood, its moments and a key to the next three and the losses."""
    weight_draws, num_paths, svi_steps, step_size = sizes
    parameters = guide.parameters
    assert isinstance(parameters, AutoConjugate)
    names = parameters.names
    (path,) = (jnp.shape(guide.prototype_trace[name]["value"]) for name in guide.path_sites())
    each = num_paths * math.prod(path) * parameters.layout.size
    together = max(1, min(weight_draws, _TOGETHER // each))

    def run(state: SVIState, held: dict[str, Array], moments: Moments, key: PRNGKeyArray) -> Any:
        def one(key: PRNGKeyArray) -> Any:
            with block(), seed(rng_seed=key), substitute(data={**svi.get_params(state), **held}):
                return guide.weight_statistics(num_paths, args, kwargs)

        found = jax.lax.map(one, jax.random.split(key, weight_draws), batch_size=together)
        moments = gathered(moments, found, step_size)
        new = dict(zip(names, likelihood_of(moments), strict=True))
        # As it was, as long as no draw has been finite.
        held = {k: jnp.where(moments.worth > 0, new[k], held[k]) for k in held}
        inner = SVI(svi.model, _Held(guide, held), svi.optim, svi.loss, **svi.static_kwargs)
        inner.constrain_fn = svi.constrain_fn

        def step(state: SVIState, _: None) -> tuple[SVIState, Array]:
            return inner.stable_update(state, *args, **kwargs)

        state, losses = jax.lax.scan(step, state, None, svi_steps)
        return state, held, moments, losses

    return run
