"""Training loops: SVI with early stopping, and alternation with the backward equation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.handlers import block, seed, substitute
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.optim import Adam

from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.score import ConditionalScorePath

# A run has stopped improving when a window's mean bound is not above the best one by this many
# of its standard errors.
_MIN_GAIN = 1.0


def fit_svi(
    svi: SVI,
    rng_key: PRNGKeyArray,
    num_steps: int,
    *args: Any,
    window: int = 200,
    patience: int | None = 5,
    init_state: SVIState | None = None,
    time_limit: float | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIRunResult:
    """Run SVI until its bound, smoothed over windows of steps, stops rising.

    As `svi.run`, with early stopping; for any model, guide, loss and optimiser (an Optax schedule
    in `SVI(model, guide, optax.adam(schedule), loss)` works as it is, but ends with the steps it
    was made for: take `patience=None` then). An interrupt from the keyboard ends the run and
    returns what there is; `init_state=result.state` goes on. Steps whose loss is not finite are
    skipped (`svi.stable_update`).

    Args:
        svi: model, guide, optimiser and loss.
        rng_key: key of initialisation and steps.
        num_steps: steps at most.
        *args: arguments of model and guide.
        window: steps over which the bound is averaged.
        patience: windows without a rise of one standard error after which to stop; None for
            none.
        init_state: state to go on from.
        time_limit: seconds after which no further window begins; None for none.
        progress_bar: show progress and the smoothed loss.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Parameters, state and losses, as `svi.run`.

    Raises:
        ValueError: a count that is not positive.
        FloatingPointError: a whole window without a finite loss.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_sde.guides import AutoFlow, fit_svi
        >>> def model(y):
        ...     level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
        >>> svi = SVI(model, AutoFlow(model, num_flows=1), numpyro.optim.Adam(0.02), Trace_ELBO())
        >>> fit = fit_svi(svi, jax.random.key(0), 5000, 0.5, window=100, progress_bar=False)
        >>> 100 <= len(fit.losses) < 5000
        True
    """
    for name, count in (("num_steps", num_steps), ("window", window)):
        if count < 1:
            raise ValueError(f"{name} must be positive, got {count}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be positive or None, got {patience}")
    state = svi.init(rng_key, *args, **kwargs) if init_state is None else init_state

    def run(state: SVIState, length: int) -> tuple[SVIState, Array]:
        def step(state: SVIState, _: None) -> tuple[SVIState, Array]:
            new, loss = svi.stable_update(state, *args, **kwargs)
            return new, loss

        return jax.lax.scan(step, state, None, length)

    compiled: Callable[..., Any] = jax.jit(run, static_argnums=1)
    losses: list[np.ndarray] = []
    best, idle, done = math.inf, 0, 0
    end = math.inf if time_limit is None else time.perf_counter() + time_limit
    with tqdm.tqdm(total=num_steps, disable=not progress_bar) as bar:
        try:
            while done < num_steps and (patience is None or idle < patience):
                length = min(window, num_steps - done)
                state, some = compiled(state, length)
                values = np.asarray(some)
                losses.append(values)
                done += length
                finite = values[np.isfinite(values)]
                if finite.size == 0:
                    raise FloatingPointError(
                        f"fit_svi: no finite loss in {length} steps; start elsewhere or "
                        "take a smaller learning rate"
                    )
                mean = float(finite.mean())
                error = float(finite.std()) / math.sqrt(finite.size)
                idle = 0 if mean < best - _MIN_GAIN * error else idle + 1
                best = min(best, mean)
                if time.perf_counter() > end:
                    break
                bar.update(length)
                bar.set_postfix_str(f"loss {mean:.4f}, best {best:.4f}", refresh=False)
        except KeyboardInterrupt:
            warnings.warn(
                f"fit_svi: interrupted after {done} of {num_steps} steps; go on with "
                "init_state=result.state",
                stacklevel=2,
            )
    every = np.concatenate(losses) if losses else np.zeros(0)
    return SVIRunResult(svi.get_params(state), state, jnp.asarray(every))


def fit_score(
    svi: SVI,
    rng_key: PRNGKeyArray,
    num_rounds: int,
    *args: Any,
    score_steps: int = 500,
    svi_steps: int = 200,
    score_optimizer: Any = None,
    num_paths: int = 8,
    init_state: SVIState | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIRunResult:
    """Alternate between the backward equation of the score and the bound: variational EM.

    Each round fits the score's network to the backward equation and its jumps at the current
    parameters, on states around paths drawn from the current law (the E step), and then raises
    the bound in all parameters (the M step; gradients pass through the simulated path, so that
    those of the diffusion learn too). With `svi_steps=0` the equation alone is solved.

    Args:
        svi: with a guide `AutoPathGuide(model, path=ConditionalScorePath(...))`.
        rng_key: key.
        num_rounds: rounds.
        *args: arguments of model and guide.
        score_steps: steps of the E step in a round.
        svi_steps: steps of the M step in a round.
        score_optimizer: NumPyro optimiser of the E step; Adam with rate 3e-3 by default.
        num_paths: paths drawn in each step of the E step.
        init_state: state to go on from.
        progress_bar: show progress.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Parameters, state and the losses of all M steps.

    Raises:
        TypeError: a guide with another law.
        ValueError: a count out of range.

    Source: arXiv:2605.05606 (2026), section on variational EM.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.guides import AutoPathGuide, ConditionalScorePath, fit_score
        >>> def model(y):
        ...     sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(-1.0, 0.1)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> guide = AutoPathGuide(model, path=ConditionalScorePath((8,)))
        >>> svi = numpyro.infer.SVI(
        ...     model, guide, numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO())
        >>> y = jax.numpy.array([-0.9, -1.2, -1.0])
        >>> fit = fit_score(
        ...     svi, jax.random.key(0), 1, y, score_steps=5, svi_steps=5, progress_bar=False)
        >>> fit.losses.shape
        (5,)
    """
    guide = svi.guide
    if not (isinstance(guide, AutoPathGuide) and isinstance(guide.path, ConditionalScorePath)):
        raise TypeError(
            "fit_score needs the guide AutoPathGuide(model, path=ConditionalScorePath()), got "
            f"{type(guide).__name__}"
        )
    for name, count, least in (
        ("num_rounds", num_rounds, 1),
        ("score_steps", score_steps, 0),
        ("svi_steps", svi_steps, 0),
        ("num_paths", num_paths, 1),
    ):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    optimizer = Adam(3e-3) if score_optimizer is None else score_optimizer
    key_init, rng_key = jax.random.split(rng_key)
    state = svi.init(key_init, *args, **kwargs) if init_state is None else init_state
    networks = [f"{name}_{guide.prefix}_network" for name in guide.path_sites()]

    def residual(network: Mapping[str, Any], params: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        def one(key: PRNGKeyArray) -> Float[Array, ""]:
            with block(), seed(rng_seed=key), substitute(data={**params, **network}):
                return guide.score_residual(*args, **kwargs)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, num_paths)))

    def e_step(params: Any, key: PRNGKeyArray) -> Any:
        def step(opt: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
            network = optimizer.get_params(opt)
            loss, slope = jax.value_and_grad(residual)(network, params, key)
            return optimizer.update(slope, opt), loss

        opt = optimizer.init({name: params[name] for name in networks})
        opt, losses = jax.lax.scan(step, opt, jax.random.split(key, score_steps))
        return optimizer.get_params(opt), losses

    compiled_e, compiled_m = jax.jit(e_step), compiled_steps(svi, svi_steps, args, kwargs)
    losses: list[np.ndarray] = []
    with tqdm.trange(num_rounds, disable=not progress_bar) as bar:
        for _ in bar:
            if score_steps:
                rng_key, key = jax.random.split(rng_key)
                network, residuals = compiled_e(svi.get_params(state), key)
                # A network has no constraint, so its values are the optimiser's own.
                free = svi.optim.get_params(state.optim_state) | network
                state = state._replace(optim_state=svi.optim.init(free))
                bar.set_postfix_str(f"residual {float(residuals[-1]):.3g}", refresh=False)
            if svi_steps:
                state, some = compiled_m(state)
                losses.append(np.asarray(some))
    every = np.concatenate(losses) if losses else np.zeros(0)
    return SVIRunResult(svi.get_params(state), state, jnp.asarray(every))


def compiled_steps(
    svi: SVI, num_steps: int, args: Any, kwargs: Any
) -> Callable[[SVIState], tuple[SVIState, Array]]:
    """Steps of an SVI as one program: a state to the next and the losses, `(num_steps,)`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO, autoguide
        >>> model = lambda: numpyro.sample("a", dist.Normal())
        >>> svi = SVI(model, autoguide.AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO())
        >>> compiled_steps(svi, 3, (), {})(svi.init(jax.random.key(0)))[1].shape
        (3,)
    """

    def step(state: SVIState, _: None) -> tuple[SVIState, Array]:
        return svi.stable_update(state, *args, **kwargs)

    return jax.jit(lambda state: jax.lax.scan(step, state, None, num_steps))
