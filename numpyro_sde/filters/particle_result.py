"""What a particle filter returns: moments, smoothed paths, and how far to trust it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.smc.backward import Dynamics, invertible
from numpyro_sde.smc.loop import over_particles
from numpyro_sde.smc.particle_filter import History
from numpyro_sde.smc.proposals import Guided
from numpyro_sde.smc.race import Race
from numpyro_sde.smc.smoothers import additive, check_backward, draw_paths, fixed_lag, genealogy
from numpyro_sde.statespace.checks import check_choice, check_count, typed_key
from numpyro_sde.statespace.model import FilterResult

SMOOTHERS = ("mcmc", "exact", "rejection", "genealogy")
# Above these a filter is not to be trusted: Pareto shape of the weights, variance of the log
# likelihood, difference of independent runs in their standard deviations.
_WORST_KHAT, _WORST_VARIANCE, _WORST_SPREAD = 0.7, 4.0, 4.0
_WORST_SHARE = 0.1


class Reliability(NamedTuple):
    """How far a particle filter's estimate is to be trusted.

    Attributes:
        khat: Pareto shape of the weights where their effective size is smallest: below 0.5 good,
            above 0.7 the particles miss a part of the law. NaN for fewer than 25 particles.
        index: grid index of that time.
        time: that time.
        ess: effective size there, as a share of the particles.
        variance: estimated variance of the log likelihood.
        spread: difference of two independent estimates of the log likelihood, in standard
            deviations of it.
        largest: the largest log likelihood that the data can have; infinity where not known.
        race: how `proposal="auto"` chose; None for others, and where nothing was raced.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.5, -0.1],
        ...     method=nsde.filters.Particle(500),
        ... )
        >>> result.reliability.complaints()
        []
    """

    khat: Float[Array, ""]
    index: Any
    time: Float[Array, ""]
    ess: Float[Array, ""]
    variance: Float[Array, ""]
    spread: Float[Array, ""]
    largest: Float[Array, ""]
    race: Race | None = None

    def complaints(self) -> list[str]:
        """What speaks against the estimate, in words; an empty list where nothing does."""
        khat, ess, variance, spread = (
            float(v) for v in (self.khat, self.ess, self.variance, self.spread)
        )
        where = f"at time {float(self.time):.6g} (grid index {int(self.index)})"
        found = []
        if khat > _WORST_KHAT and ess < _WORST_SHARE:
            found.append(
                f"{where} the weights have a Pareto shape of {khat:.2f} and an effective size of "
                f"{100.0 * ess:.2g} % of the particles"
            )
        if variance > _WORST_VARIANCE:
            found.append(
                f"the log likelihood has an estimated variance of {variance:.3g}; weights are most "
                f"uneven {where}"
            )
        if spread > _WORST_SPREAD:
            found.append(f"two independent runs differ by {spread:.1f} standard deviations")
        return found


@partial(jax.jit, static_argnums=(4, 5, 6))
def _draw(
    law: Dynamics,
    history: History,
    guide: Any,
    key: PRNGKeyArray,
    num_draws: int,
    method: str,
    num_moves: int,
) -> Array:
    look_ahead = _look_ahead(law, guide)
    options: dict[str, Any] = {"method": method, "num_moves": num_moves, "look_ahead": look_ahead}
    return draw_paths(law, history, key, num_draws, **options)[0]


@partial(jax.jit, static_argnums=(4, 5))
def _add_up(
    law: Dynamics,
    history: History,
    guide: Any,
    key: PRNGKeyArray,
    functional: Callable[..., Array],
    num_backward: int,
) -> Array:
    look_ahead = _look_ahead(law, guide)
    return additive(law, history, key, functional, num_backward=num_backward, look_ahead=look_ahead)


def _look_ahead(law: Dynamics, guide: Any) -> Callable[[Any, Array], Any] | None:
    if guide is None:
        return None
    proposal = Guided()

    def ahead(k: Any, x: Array) -> Any:
        node = jax.tree.map(lambda a: a[k], guide)
        return over_particles(lambda x: proposal.look_ahead(law.model, node, x), -1)(x)

    return ahead


class ParticleResult(FilterResult):
    """What a particle filter returns.

    Moments are those of the weighted particles. With `history=True` the smoothing law can be
    drawn from, path by path.

    Attributes:
        variance: estimated relative variance of the likelihood estimate, about that of
            `log_likelihood`; useless where it is above 1 or so.
        ess: effective sample sizes where particles may be resampled, `(N,)`.
        resampled: whether they were, `(N,)`.
        reliability: how far the estimate is to be trusted.
        history: all particles and their ancestors, or None.
        law: the path law, for smoothing, or None.
        guide: what the proposal knew of later observations, or None.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1, 0.2], init=dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.2, -0.1],
        ...     method=nsde.filters.Particle(100, history=True),
        ... )
        >>> result.sample(jax.random.key(0), 20).shape
        (20, 3, 1)
        >>> result.additive(jax.random.key(0), lambda t, dt, x, x_next: x * dt).shape
        (2, 1)
    """

    variance: Any = None
    ess: Any = None
    resampled: Any = None
    reliability: Reliability | None = None
    history: History | None = None
    law: Dynamics | None = None
    guide: Any = None

    def _kept(self) -> tuple[Dynamics, History]:
        if self.history is None or self.law is None:
            raise ValueError(
                "this particle filter kept no history: run it with Particle(..., history=True)"
            )
        return self.law, self.history

    def sample(
        self,
        key: PRNGKeyArray,
        num_draws: int = 1,
        *,
        method: str | None = None,
        num_moves: int = 2,
    ) -> Float[Array, "draws N d"]:
        """Draw paths from the smoothing law.

        Args:
            key: random key.
            num_draws: number of paths.
            method: "mcmc" (linear cost), "exact" (all particles weighed at every block, with a
                bridge each), "rejection" (only where every grid time is observed), "genealogy"
                (ancestral lines: poor at the beginning of long series). None takes "mcmc" where
                transitions have a density, else "genealogy".
            num_moves: moves of "mcmc" in each block.

        Raises:
            ValueError: no history, an unknown method, or one that this model does not allow.
        """
        law, history = self._kept()
        reason = invertible(law.model)
        if method is None:
            method = "genealogy" if reason else "mcmc"
        check_choice("method", method, SMOOTHERS)
        if reason and method != "genealogy":
            raise ValueError(f"method={method!r} weighs transitions, but {reason}: use 'genealogy'")
        if method == "rejection" and law.longest > 1:
            raise ValueError(
                "method='rejection' bounds the transition between observed times, but this grid "
                f"has up to {law.longest} steps between them: use 'mcmc' or 'exact'"
            )
        return _draw(law, history, self.guide, typed_key(key), num_draws, method, num_moves)

    def smooth(
        self, key: PRNGKeyArray | None = None, *, lag: int | None = None
    ) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
        """Smoothed means and covariances, given all observations or those of a lag.

        Args:
            key: random key of backward sampling, as many paths as particles; None for a fixed one.
            lag: give the moments given data up to so many grid steps later instead.
        """
        _, history = self._kept()
        if lag is not None:
            check_count("lag", lag, least=0)
            return fixed_lag(history, lag)
        key = jax.random.key(0) if key is None else key
        paths = self.sample(key, history.log_weights.shape[1])
        mean = jnp.mean(paths, axis=0)
        centred = paths - mean[None]
        return mean, jnp.einsum("kni,knj->nij", centred, centred) / paths.shape[0]

    def genealogies(self) -> tuple[Float[Array, "M N d"], Float[Array, " M"]]:
        """Ancestral lines of the last particles, and their normalised log weights."""
        _, history = self._kept()
        return genealogy(history), jax.nn.log_softmax(history.log_weights[-1])

    def additive(
        self,
        key: PRNGKeyArray,
        functional: Callable[[Array, Array, Array, Array], Array],
        *,
        num_backward: int = 2,
    ) -> Float[Array, "blocks ..."]:
        """Smoothed sums of `functional(t, dt, x, x_next)` along the path: PaRIS.

        From the history that was kept; `nsde.filter_additive` needs none.

        Args:
            key: random key.
            functional: the term of one grid step, states `(d,)`.
            num_backward: ancestors drawn for each particle.

        Returns:
            The expected sum up to the end of each block between observed times, given the data up
            to there; the last entry is given all data.

        Raises:
            ValueError: no history, a transition without density, or fewer than 2 ancestors.
        """
        law, history = self._kept()
        reason = invertible(law.model)
        if reason:
            raise ValueError(f"additive weighs transitions, but {reason}")
        check_backward(num_backward)
        return _add_up(law, history, self.guide, typed_key(key), functional, num_backward)

    def backward_kernel(self) -> Any:
        """Not for particles: they have no Gaussian backward kernel."""
        raise TypeError("a particle filter has no Gaussian backward kernel: use sample or smooth")
