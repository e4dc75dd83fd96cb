"""A Markov chain as one compiled function of key and data.

`numpyro.infer.MCMC` compiles parts of its start anew at every run, seconds each time. Calibration
runs hundreds of short chains on data of one shape: here all of a chain, its start included, is one
function under `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray
from numpyro.infer.mcmc import MCMCKernel


def compiled_chain(
    kernel: MCMCKernel, num_warmup: int, num_samples: int, *, thinning: int = 1
) -> Callable[..., dict[str, Array]]:
    """Make a function that runs one chain of a kernel, compiled once for all data of a shape.

    For many fits of one model, as in `sbc`. Not for a single fit: `numpyro.infer.MCMC` has
    progress, several chains, and diagnostics. Models that need data outside of a trace will say
    so (a model with Python control flow on data).

    Args:
        kernel: Any NumPyro kernel: `NUTS(model)`, `ParticleGibbs(model)`.
        num_warmup: Warm-up iterations.
        num_samples: Iterations after it.
        thinning: Keep every so many of them.

    Returns:
        `run(rng_key, *model_args, **model_kwargs)`, a dictionary of draws as
        `MCMC.get_samples()` has it, deterministic sites included.

    Raises:
        ValueError: If a number is not positive, or `thinning` does not divide `num_samples`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import BarkerMH
        >>> from numpyro_sde.diagnostics import compiled_chain
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> run = compiled_chain(BarkerMH(model), num_warmup=50, num_samples=100)
        >>> run(jax.random.key(0), 0.5)["a"].shape
        (100,)
    """
    for name, count in {"num_samples": num_samples, "thinning": thinning}.items():
        if count < 1:
            raise ValueError(f"{name} must be positive, got {count}")
    if num_warmup < 0:
        raise ValueError(f"num_warmup must not be negative, got {num_warmup}")
    if num_samples % thinning:
        raise ValueError(f"thinning must divide num_samples={num_samples}, got {thinning}")

    def run(rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> dict[str, Array]:
        def step(state: Any, _: None) -> tuple[Any, None]:
            return kernel.sample(state, args, kwargs), None

        def keep(state: Any, _: None) -> tuple[Any, Any]:
            state, _ = jax.lax.scan(step, state, None, thinning)
            return state, getattr(state, kernel.sample_field)

        state = kernel.init(rng_key, num_warmup, None, args, kwargs)
        state, _ = jax.lax.scan(step, state, None, num_warmup)
        _, draws = jax.lax.scan(keep, state, None, num_samples // thinning)
        constrain = kernel.postprocess_fn(args, kwargs)
        return jax.lax.map(constrain, draws, batch_size=64)

    return jax.jit(run)
