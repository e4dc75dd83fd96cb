"""Parallel tempering between a reference, the prior, and the posterior, as one kernel.

Levels of inverse temperature from 0 to 1 run side by side in one program; neighbours exchange
places, even pairs and odd ones in turn, so that draws of the reference travel to the posterior and
back: a chain that a barrier would keep in one mode is renewed from the reference. Source: Syed,
Bouchard-Cote, Deligiannidis and Doucet (2022), "Non-reversible parallel tempering".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro.infer import MCMC
from numpyro.infer.initialization import init_to_median

from numpyro_sde.infer.ladder import (
    along,
    exchange_order,
    exchange_rejections,
    first_ladder,
    respaced,
)
from numpyro_sde.infer.rotation import (
    Level,
    Reference,
    TemperedModel,
    prior_reference,
    quarter_turn,
    rotate,
)
from numpyro_sde.infer.tempering_report import TemperingReport, report_on
from numpyro_sde.infer.unconstrained import UnconstrainedKernel
from numpyro_sde.models.stack import outside_all_meshes, progress_is_shown
from numpyro_sde.runtime.entry import Held, entry_point
from numpyro_sde.runtime.progress import told
from numpyro_sde.statespace.checks import check_choice, check_count, typed_key

# Ends of the rounds of warm-up, as shares of it, after which levels and scales are set anew.
_ROUNDS = (0.05, 0.12, 0.25, 0.45, 0.7)
_TARGET_ACCEPT = 0.75
_SHORTEST_JITTER = 0.7
# Largest angle of a trajectory in quarter turns; further it would come back.
_MOST_TURN = 1.2
_NARROWEST_SCALE = 0.02
# Of the draws of the prior that place the reference; any reference gives the same posterior.
_REFERENCE_SEED = 0
# Draws that are worth as much as not knowing a scale at all.
_PSEUDO_DRAWS = 20.0


class Spread(NamedTuple):
    """Running moments of the places of all levels in a round of warm-up."""

    size: Int[Array, ""]
    mean: Float[Array, "K D"]
    squares: Float[Array, "K D"]
    rejected: Float[Array, " K-1"]


class TemperedState(NamedTuple):
    """State of `Tempered`; levels from the reference (first) to the posterior (last).

    Attributes:
        i: number of sweeps so far.
        z: unconstrained values by site at the last level: the draw.
        positions: where each level is, in its own coordinates, `(K, D)`.
        log_ratio: log ratio of joint density to reference of path and parameters there, `(K,)`.
        betas: inverse temperatures, `(K,)`.
        log_step: log angle of a step at each level, `(K,)`.
        scale: standard deviations that moves take each coordinate to have, `(K, D)`.
        acceptance: probability that the last move was accepted, `(K,)`.
        rejection: probability that neighbours did not exchange in the last sweep, `(K - 1,)`.
        replica: which replica is at each level, `(K,)`.
        renewed: whether a replica has been at the reference since it last was at the posterior.
        round_trips: how often a replica came from the reference to the posterior, warm-up left out.
        reference: where the reference lies among unconstrained values.
        spread: moments of the present round of warm-up.
        rng_key: key of the next sweep.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.TemperedState._fields[:3]
        ('i', 'z', 'positions')
    """

    i: Int[Array, ""]
    z: dict[str, Array]
    positions: Float[Array, "K D"]
    log_ratio: Float[Array, " K"]
    betas: Float[Array, " K"]
    log_step: Float[Array, " K"]
    scale: Float[Array, "K D"]
    acceptance: Float[Array, " K"]
    rejection: Float[Array, " K-1"]
    replica: Int[Array, " K"]
    renewed: Bool[Array, " K"]
    round_trips: Int[Array, ""]
    reference: Reference
    spread: Spread
    rng_key: PRNGKeyArray


class Tempered(UnconstrainedKernel):
    """Parallel tempering for posteriors with several modes, with the evidence.

    Level k has the law `reference x (posterior / reference)^beta_k`. The reference is the prior:
    paths drawn without a look at the data, and other sites as a normal law with the quantiles of
    their prior. Along guided paths every level moves in the coordinates of a guide that pulls with
    strength beta_k; what the guide does not reach is reached all the same. Each sweep moves every
    level by a short Hamiltonian trajectory and exchanges neighbours. Warm-up places the levels so
    that all exchanges are rejected equally often, and finds step sizes and scales of the moves.

    Run it under `numpyro.infer.MCMC`: the draws are those of the posterior. Then look at
    `kernel.report(mcmc)`: round trips from the reference to the posterior, and the log evidence
    with its error. Believe several modes only with some 50 round trips; shares of two mirrored
    modes err by about `0.5 / sqrt(round trips)`.

    For models of one mode `SplitNUTS` is several times cheaper. With few parameters and many data,
    or where innovations are far from normal given the data, particle filters see all modes too, and
    cheaper: `PMMH`, and `nsde.evidence`.

    Args:
        model: the model; its paths under `reparam.GuidedReparam` or `InnovationReparam`, or
            integrated out. All latent sites continuous and of proper laws.
        num_levels: number K of levels, at least 2; about twice the barrier and two more. The report
            says where more are needed.
        num_steps: steps of a trajectory.
        reference: "prior"; or "guide", prior times guide along guided paths. That is nearer to the
            posterior, so that fewer levels do, but a mode that the guide does not reach is missed
            without a sign: only where `diagnostics.guide_quality` finds a guide that covers, as for
            long series whose modes lie in the parameters.

    Raises:
        ValueError: `num_levels` below 2, an unknown reference; at the start of the run, a latent
            site that is discrete or cannot be drawn from its law.
        TypeError: `model` is no function; a count that is no integer.

    A draw takes `num_levels * (num_steps + 1)` gradients, those of one step side by side. The
    states are trees of arrays: a run goes on from `mcmc.last_state`, in another process too.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("y", dist.Normal(abs(x), 0.2), obs=y)
        >>> kernel = nsde.infer.Tempered(model, num_levels=5)
        >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 2.0)
        >>> found = kernel.report(mcmc)
        >>> bool(0.3 < (mcmc.get_samples()["x"] > 0).mean() < 0.7), found.round_trips > 50
        (True, True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_levels: int = 12,
        num_steps: int = 8,
        reference: str = "prior",
    ) -> None:
        super().__init__(model, None, init_to_median)
        check_count("num_levels", num_levels, least=2)
        check_count("num_steps", num_steps)
        check_choice("reference", reference, ("prior", "guide"))
        self.num_levels, self.num_steps = num_levels, num_steps
        self.reference = reference

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "log_ratio", "acceptance", "rejection", "round_trips")

    def get_diagnostics_str(self, state: TemperedState) -> str:
        barrier = float(jnp.mean(jnp.sum(state.spread.rejected, axis=-1)))
        barrier /= max(int(jnp.max(state.spread.size)), 1)
        trips = int(jnp.sum(state.round_trips))
        return f"{trips} round trips, barrier {barrier:.1f}"

    def report(self, mcmc: MCMC) -> TemperingReport:
        """Round trips, rejections and the evidence of a run of this kernel.

        Args:
            mcmc: after `run`.

        Raises:
            ValueError: no run of `Tempered`.
        """
        return report_on(mcmc)

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> TemperedState:
        self._num_warmup = num_warmup
        kwargs = {} if model_kwargs is None else model_kwargs
        assert self._model is not None
        keys = typed_key(rng_key)
        shown = progress_is_shown(sys._getframe(1))
        # The same reference for all chains of a run, those that run in parallel included.
        with (
            told("looking at the model and its prior", shown),
            outside_all_meshes(),
            jax.ensure_compile_time_eval(),
        ):
            centre, reference = prior_reference(
                self._model, model_args, kwargs, jax.random.key(_REFERENCE_SEED)
            )
        if shown:
            print("compiling the sampler: the bar moves when that is done", file=sys.stderr)
        return self._first(keys, (init_params, centre, reference), model_args, kwargs)

    def _first(self, key: PRNGKeyArray, z: Any, args: Any, kwargs: Any) -> TemperedState:
        del args, kwargs
        params, centre, reference = z
        sizes = Held((self.num_levels, self.num_steps))
        return _first_states(key, params, centre, reference, sizes)

    def _step(self, state: TemperedState, args: Any, kwargs: Any) -> TemperedState:
        assert self._model is not None
        _, back = ravel_pytree(state.z)
        rng_key, move_key, jitter_key, swap_key = jax.random.split(state.rng_key, 4)
        tempered = TemperedModel(
            self._model, args, kwargs, back, state.reference, self.reference == "prior"
        )
        levels, dtype = state.betas.shape[0], state.betas.dtype
        jitter = jax.random.uniform(jitter_key, (levels,), dtype, _SHORTEST_JITTER, 1.0)
        # The reference itself is drawn anew: a quarter turn ends at the momentum.
        step = jnp.exp(state.log_step) * jitter
        step = step.at[0].set(quarter_turn(self.num_steps))
        scale = state.scale.at[0].set(1.0)

        def move(x: Array, level: Level, step: Array, scale: Array, key: PRNGKeyArray) -> Any:
            look = partial(tempered.look, level=level)
            return rotate(look, self.num_steps, look(x), level.beta, step, scale, key)

        at = tempered.level(state.betas)
        keys = jax.random.split(move_key, levels)
        places, acceptance = jax.vmap(move)(state.positions, at, step, scale, keys)
        rejection = exchange_rejections(state.betas, places.log_ratio)
        uniforms = jax.random.uniform(swap_key, rejection.shape, dtype)
        order = exchange_order(rejection, uniforms, state.i % 2)
        before = jax.tree.map(lambda a: a[order], at)
        positions = jax.vmap(tempered.carry)(places.x[order], before, at)
        replica = state.replica[order]
        renewed = state.renewed.at[replica[0]].set(True)
        arrived = renewed[replica[-1]]
        warming = state.i < self._num_warmup
        new = state._replace(
            i=state.i + 1,
            z=back(state.reference.place(positions[-1])),
            positions=positions,
            log_ratio=places.log_ratio[order],
            acceptance=acceptance,
            rejection=rejection,
            replica=replica,
            renewed=renewed.at[replica[-1]].set(False),
            round_trips=jnp.where(warming, 0, state.round_trips + arrived),
            spread=_gathered(state.spread, positions, rejection),
            rng_key=rng_key,
        )
        return jax.lax.cond(warming, self._adapt, lambda state: state, new)

    def _adapt(self, state: TemperedState) -> TemperedState:
        """Step sizes after each sweep; levels and scales at the end of a round."""
        # A gain that falls within a round: cold levels need many halvings at once.
        gain = 1.0 / jnp.sqrt(state.spread.size.astype(state.log_step.dtype))
        most = jnp.log(_MOST_TURN * quarter_turn(self.num_steps))
        log_step = state.log_step + gain * (state.acceptance - _TARGET_ACCEPT)
        state = state._replace(log_step=jnp.minimum(log_step, most))
        ends = np.unique([int(share * self._num_warmup) for share in _ROUNDS])
        closes = jnp.any(state.i == jnp.asarray(ends))
        return jax.lax.cond(closes, _next_round, lambda state: state, state)

    def refresh(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        del state, model_args, model_kwargs
        raise TypeError(
            "Tempered moves all sites of a model at all levels, and cannot be a block of a Gibbs "
            "sampler: run it alone"
        )


@entry_point
def _first_states(
    keys: PRNGKeyArray, params: Any, centre: dict[str, Array], reference: Reference, sizes: Held
) -> TemperedState:
    """The first state of a chain, or several: levels at draws of the reference, or as given."""
    flat, back = ravel_pytree(centre)
    (levels, steps), dim = sizes.value, flat.size

    def first(key: PRNGKeyArray, params: Any) -> TemperedState:
        key, start_key = jax.random.split(key)
        x = jax.random.normal(start_key, (levels, dim), flat.dtype)
        if params is not None:
            given = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(a, flat.dtype), params))[0]
            x = jnp.broadcast_to((given - reference.loc) / reference.spread, x.shape)
        betas = jnp.asarray(first_ladder(levels), flat.dtype)
        zeros = jnp.zeros(levels, flat.dtype)
        return TemperedState(
            i=jnp.zeros((), int),
            z=back(reference.place(x[-1])),
            positions=x,
            log_ratio=zeros,
            betas=betas,
            log_step=jnp.log(quarter_turn(steps)) + zeros,
            scale=jnp.ones_like(x),
            acceptance=zeros,
            rejection=zeros[1:],
            replica=jnp.arange(levels),
            renewed=jnp.zeros(levels, bool),
            round_trips=jnp.zeros((), int),
            reference=reference,
            spread=_no_spread(levels, dim, flat.dtype),
            rng_key=key,
        )

    return first(keys, params) if keys.ndim == 0 else jax.vmap(first)(keys, params)


def _no_spread(levels: int, dim: int, dtype: Any) -> Spread:
    none = jnp.zeros((levels, dim), dtype)
    return Spread(jnp.zeros((), int), none, none, jnp.zeros(levels - 1, dtype))


def _gathered(spread: Spread, x: Float[Array, "K D"], rejection: Float[Array, " K-1"]) -> Spread:
    count = spread.size + 1
    away = x - spread.mean
    mean = spread.mean + away / count.astype(x.dtype)
    squares = spread.squares + away * (x - mean)
    return Spread(count, mean, squares, spread.rejected + rejection)


def _next_round(state: TemperedState) -> TemperedState:
    """Levels of equal rejection, and the scales that the last round has shown."""
    count, _, squares, rejected = state.spread
    size = count.astype(squares.dtype)
    betas = respaced(state.betas, rejected / size)
    variance = squares / jnp.maximum(size - 1.0, 1.0)
    known = size / (size + _PSEUDO_DRAWS)
    scale = jnp.exp(0.5 * known * jnp.log(jnp.maximum(variance, _NARROWEST_SCALE**2)))
    scale = jnp.minimum(scale, 1.0)
    return state._replace(
        betas=betas,
        log_step=along(betas, state.betas, state.log_step),
        scale=along(betas, state.betas, scale),
        spread=jax.tree.map(jnp.zeros_like, state.spread),
    )
