"""Posterior draws renewed when data are added, instead of a new run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.handlers import seed, trace
from numpyro.infer.util import constrain_fn, potential_energy, unconstrain_fn

from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.statespace.checks import check_count, typed_key

_TARGET_ACCEPT, _GAIN = 0.8, 1.0
_MOST_STAGES = 200


class RenewedDraws(NamedTuple):
    """Draws given all data, and what the added data said.

    Attributes:
        samples: values by site, `(N, *site)`, equally weighted; deterministic sites included.
        log_evidence: of the added data given the earlier, `log p(y_new | y_old)`.
        share: effective share of the old draws if they were only reweighed; near 1, the new data
            changed little, near 0 all rests on the moves.
        stages: how many steps led from the old posterior to the new one.
        accept: mean acceptance of the last moves.

    Example:
        >>> from numpyro_sde.infer import RenewedDraws
        >>> RenewedDraws._fields
        ('samples', 'log_evidence', 'share', 'stages', 'accept')
    """

    samples: dict[str, Array]
    log_evidence: float
    share: float
    stages: int
    accept: float


def ibis(
    model: Callable[..., Any],
    samples: Mapping[str, ArrayLike],
    old: tuple[Any, ...] | Mapping[str, Any],
    new: tuple[Any, ...] | Mapping[str, Any],
    *,
    rng_key: PRNGKeyArray,
    num_moves: int = 5,
    num_leapfrog: int = 8,
    least_share: float = 0.5,
) -> RenewedDraws:
    """Carry posterior draws given the old data to the posterior given old and new.

    Iterated batch importance sampling (Chopin 2002, "A sequential particle filter method for static
    models", Biometrika 89), with the added data brought in by powers of their likelihood where they
    say much at once, and Hamiltonian moves at each. The sampler is BlackJAX's adaptive tempered
    SMC; its reference is the old posterior, its likelihood that of the new data given the old.

    For parameters with their paths integrated out (`handlers.marginalize`): a latent path grows
    with the data. Draws keep what errors they come with: start from a converged run, and run MCMC
    anew now and then. When not to use it: under `filters.Particle`, whose likelihood is a random
    number (`infer.PMMH` is made for that); where a gradient for data of a new length compiles
    longer than a run would take.

    Args:
        model: a NumPyro model, its latent sites the same under old and new data.
        samples: posterior draws by site given the old data, `(N, *site)`, as `MCMC.get_samples`
            gives them. Sites that are not latent are ignored.
        old: arguments of the model with the old data: a tuple, or a mapping of keywords.
        new: the same with all data.
        rng_key: random key.
        num_moves: Hamiltonian moves of each draw at each stage.
        num_leapfrog: leapfrog steps of a move.
        least_share: effective share of draws that a stage keeps, in (0, 1).

    Returns:
        Draws, as many as came, and the evidence of the added data.

    Raises:
        ImportError: BlackJAX is not installed.
        ValueError: sites that differ between old and new data, draws that lack one or whose shape
            is not the model's, draws that the old model finds impossible, a share outside (0, 1).
        RuntimeError: data so surprising that the new posterior is not reached.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC, NUTS
        >>> def model(times, y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> model = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> times, y = 0.5 * np.arange(12), np.sin(np.arange(12.0))
        >>> mcmc = MCMC(NUTS(model), num_warmup=100, num_samples=200, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), times[:10], y[:10])
        >>> old, new = (times[:10], y[:10]), (times, y)
        >>> draws = mcmc.get_samples()
        >>> renewed = nsde.infer.ibis(model, draws, old, new, rng_key=jax.random.key(1))
        >>> renewed.samples["rate"].shape, 0.5 < renewed.share <= 1.0
        ((200,), True)
    """
    check_count("num_moves", num_moves)
    check_count("num_leapfrog", num_leapfrog)
    if not 0.0 < least_share < 1.0:
        raise ValueError(f"least_share must be in (0, 1), got {least_share}")
    before, after = (_call(name, value) for name, value in (("old", old), ("new", new)))
    values = _of_latent_sites(model, before, after, samples)
    start = jax.jit(jax.vmap(partial(unconstrain_fn, model, *before)))(values)
    count = len(next(iter(values.values())))
    _, back = ravel_pytree(jax.tree.map(lambda a: a[0], start))
    points = jax.vmap(lambda z: ravel_pytree(z)[0])(start)

    def log_old(z: Array) -> Array:
        return -potential_energy(model, *before, back(z))

    def log_gain(z: Array) -> Array:
        return -potential_energy(model, *after, back(z)) - log_old(z)

    gains = jax.jit(jax.vmap(log_gain))(points)
    if not bool(jnp.all(jnp.isfinite(gains))):
        bad = int(jnp.sum(~jnp.isfinite(gains)))
        raise ValueError(
            f"the log density under old or new data is not finite at {bad} of {count} draws: are "
            "they draws of this model given the old data?"
        )
    weights = jnp.exp(gains - jnp.max(gains))
    share = float(jnp.sum(weights) ** 2 / jnp.sum(weights**2)) / count
    renewed = _carry(
        points, log_old, log_gain, typed_key(rng_key), num_moves, num_leapfrog, least_share
    )
    constrain = partial(constrain_fn, model, *after, return_deterministic=True)
    drawn = jax.jit(lambda z: jax.lax.map(lambda z: constrain(back(z)), z, batch_size=64))
    return RenewedDraws(dict(drawn(renewed.points)), renewed.log_evidence, share, *renewed[2:])


class _Carried(NamedTuple):
    points: Float[Array, "N D"]
    log_evidence: float
    stages: int
    accept: float


def _carry(
    points: Float[Array, "N D"],
    log_old: Callable[[Array], Array],
    log_gain: Callable[[Array], Array],
    key: PRNGKeyArray,
    num_moves: int,
    num_leapfrog: int,
    least_share: float,
) -> _Carried:
    """From draws of one density to draws of another, in stages; scales from the draws."""
    from numpyro_sde.interop.blackjax import tempered_stages

    begin, step = tempered_stages(log_old, log_gain, num_leapfrog, least_share)
    state = begin(points)
    log_step, log_evidence, accept = np.log(1.2 / num_leapfrog), 0.0, 1.0
    for stage in range(_MOST_STAGES):
        # BlackJAX moves first and weighs then: one more stage once the new posterior is reached.
        last = float(state.tempering_param) >= 1.0
        key, own = jax.random.split(key)
        spread = jnp.var(state.particles, axis=0, keepdims=True)
        parameters = {
            "step_size": jnp.exp(jnp.full(1, log_step, points.dtype)),
            "inverse_mass_matrix": jnp.maximum(spread, jnp.finfo(points.dtype).tiny),
        }
        state, info = step(own, state, num_moves, parameters)
        accept = float(jnp.mean(info.update_info.acceptance_rate))
        log_step += _GAIN * (accept - _TARGET_ACCEPT)
        log_evidence += float(info.log_likelihood_increment)
        if last:
            return _Carried(state.particles, log_evidence, stage + 1, accept)
    raise RuntimeError(
        f"the new posterior was not reached in {_MOST_STAGES} stages: it is too far from the old "
        "one; run MCMC on all data"
    )


def _call(name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model."""
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple):
        return value, {}
    raise TypeError(
        f"{name} must be a tuple of the model's arguments or a mapping of its keywords, got "
        f"{type(value).__name__}"
    )


def _of_latent_sites(
    model: Callable[..., Any], before: Any, after: Any, samples: Mapping[str, ArrayLike]
) -> dict[str, Array]:
    """The draws of the model's latent sites, checked."""
    shapes, again = (_latent_shapes(partial(model, *a, **k), samples) for a, k in (before, after))
    for name in sorted(shapes.keys() | again.keys()):
        here, there = shapes.get(name), again.get(name)
        if here != there:
            raise ValueError(
                f"latent site {name!r} has shape {here} under the old data and {there} under the "
                "new: ibis renews what both have; integrate a path out with handlers.marginalize"
            )
    values = on_one_device(samples, shapes)
    counts = {len(value) for value in values.values()}
    for name, shape in shapes.items():
        if values[name].shape[1:] != shape or len(counts) > 1:
            raise ValueError(
                f"samples of {name!r} must have shape (N, *{shape}), one N for all sites, got "
                f"{values[name].shape}"
            )
    return values


def _latent_shapes(
    model: Callable[[], Any], samples: Mapping[str, ArrayLike]
) -> dict[str, tuple[int, ...]]:
    def run() -> dict[str, Any]:
        sites = trace(seed(model, jax.random.key(0))).get_trace()
        return {
            name: jnp.asarray(site["value"])
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }

    found = {name: value.shape for name, value in jax.eval_shape(run).items()}
    if not found:
        raise ValueError("ibis: the model has no latent site")
    missing = sorted(set(found) - set(samples))
    if missing:
        raise ValueError(f"samples lack the latent sites {missing}; got {sorted(samples)}")
    return found
