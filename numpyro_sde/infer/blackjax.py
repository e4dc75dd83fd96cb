"""BlackJAX's samplers as kernels of `numpyro.infer.MCMC`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro.infer.initialization import init_to_uniform

from numpyro_sde.infer.unconstrained import UnconstrainedKernel
from numpyro_sde.statespace.checks import check_count


class BlackJAXState(NamedTuple):
    """State of `BlackJAX`.

    Attributes:
        i: number of draws so far.
        z: unconstrained values by site.
        inner: state of BlackJAX's own.
        adaptation: `adaptation.tuning` holds step size and inverse mass matrix.
        accept_prob: acceptance probability of the last draw, 1 for algorithms without rejection.
        mean_accept_prob: its mean since warm-up ended (during warm-up, since the start).
        diverging: whether a transition of the last draw diverged.
        num_steps: integrator steps of the last draw.
        energy_change: energy error of the last transition, 0 where the algorithm gives none.
        rng_key: key of the next draw.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.BlackJAXState._fields[:3]
        ('i', 'z', 'inner')
    """

    i: Int[Array, ""]
    z: dict[str, Array]
    inner: Any
    adaptation: Any
    accept_prob: Float[Array, ""]
    mean_accept_prob: Float[Array, ""]
    diverging: Bool[Array, ""]
    num_steps: Int[Array, ""]
    energy_change: Float[Array, ""]
    rng_key: PRNGKeyArray


class BlackJAX(UnconstrainedKernel):
    """A BlackJAX sampler under `numpyro.infer.MCMC`.

    | `algorithm` | what it is | tuned in warm-up |
    | --- | --- | --- |
    | "nuts" | no-U-turn sampler | step size, mass matrix |
    | "hmc", "multinomial_hmc" | `num_steps` steps a draw | step size, mass matrix |
    | "mclmc" | microcanonical Langevin, unadjusted | step size, variances |
    | "adjusted_mclmc" | the same with rejection, `num_steps` on average | step size, mass matrix |

    "mclmc" is fast in many dimensions but follows the posterior only up to a bias, which warm-up
    keeps small by the energy error; and a draw is one integrator step, so draws are many and near
    each other: `steps_per_draw`, or `MCMC(..., thinning=...)`. Both microcanonical algorithms need
    at least two unknowns. BlackJAX's own objects (`blackjax.nuts`) stand for their names.

    Any other algorithm: a function from a log density of the vector of all unconstrained values to
    a BlackJAX `SamplingAlgorithm`, as `lambda f: blackjax.mala(f, 0.1)`; it is not tuned.

    Args:
        model: the model, or None with `potential_fn`.
        algorithm: see above. `BlackJAX("mclmc", model)` is understood too.
        potential_fn: minus a log density of unconstrained values, instead of a model; then `run`
            needs `init_params`.
        step_size: first step size; None for a default.
        dense_mass: adapt a full covariance and not only variances ("nuts" and the two of HMC).
        target_accept_prob: acceptance rate that warm-up aims at; None for the algorithm's own:
            0.8, for "adjusted_mclmc" 0.9.
        num_steps: integrator steps of "hmc" and "multinomial_hmc" (10), mean number of
            "adjusted_mclmc" (2).
        max_tree_depth: of "nuts".
        steps_per_draw: transitions between draws.
        init_strategy: where chains begin, one of `numpyro.infer.init_to_*`.

    Raises:
        ValueError: an unknown algorithm, an option out of range, both or neither of `model` and
            `potential_fn`.
        TypeError: an algorithm that is none, a count that is no integer.
        ImportError: BlackJAX is not installed (`numpyro-sde[blackjax]`).

    Extra fields are those of `BlackJAXState`, as "num_steps" or "adaptation.tuning.step_size".

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 2.0))
        >>> kernel = nsde.infer.BlackJAX(model, "nuts")
        >>> mcmc = MCMC(kernel, num_warmup=300, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), extra_fields=("num_steps",))
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 3.0) < 0.5)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        algorithm: Any = "nuts",
        *,
        potential_fn: Callable[[Any], Any] | None = None,
        step_size: float | None = None,
        dense_mass: bool = False,
        target_accept_prob: float | None = None,
        num_steps: int | None = None,
        max_tree_depth: int = 10,
        steps_per_draw: int = 1,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        from numpyro_sde.interop.blackjax import make_algorithm, name_of

        if name_of(model) is not None:
            # In the other order; without a second argument the model may be a potential_fn.
            given = algorithm if algorithm != "nuts" else None
            model, algorithm = given, model
        super().__init__(model, potential_fn, init_strategy)
        if step_size is not None and not (np.ndim(step_size) == 0 and 0 < step_size < np.inf):
            raise ValueError(f"step_size must be one positive number, got {step_size!r}")
        if target_accept_prob is not None and not 0 < target_accept_prob < 1:
            raise ValueError(f"target_accept_prob must be in (0, 1), got {target_accept_prob}")
        for name, count in (
            ("num_steps", 1 if num_steps is None else num_steps),
            ("max_tree_depth", max_tree_depth),
            ("steps_per_draw", steps_per_draw),
        ):
            check_count(name, count)
        make_algorithm(algorithm, num_steps, max_tree_depth)  # refused now, not in the run
        named = name_of(algorithm)
        if dense_mass and named not in ("nuts", "hmc", "multinomial_hmc"):
            raise ValueError(f"dense_mass: {named or 'this algorithm'} has no dense mass matrix")
        self.algorithm = algorithm if named is None else named
        self.step_size, self.dense_mass = step_size, dense_mass
        self.target_accept_prob = target_accept_prob
        self.num_steps, self.max_tree_depth = num_steps, max_tree_depth
        self.steps_per_draw = steps_per_draw

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "diverging")

    def get_diagnostics_str(self, state: BlackJAXState) -> str:
        size = float(jnp.mean(state.adaptation.tuning.step_size))
        return (
            f"{int(jnp.max(state.num_steps))} steps of size {size:.2e}. "
            f"acc. prob={float(jnp.mean(state.mean_accept_prob)):.2f}"
        )

    def _parts(self) -> tuple[Any, Any]:
        from numpyro_sde.interop.blackjax import make_adaptation, make_algorithm

        algorithm = make_algorithm(self.algorithm, self.num_steps, self.max_tree_depth)
        return algorithm, make_adaptation(
            algorithm,
            self._num_warmup,
            self.step_size,
            self.dense_mass,
            self.target_accept_prob,
        )

    def _log_density(self, back: Any, args: Any, kwargs: Any) -> Callable[[Array], Array]:
        potential = self._potential(args, kwargs)
        return lambda position: -potential(back(position))

    def _first(self, key: PRNGKeyArray, z: Any, args: Any, kwargs: Any) -> BlackJAXState:
        algorithm, adaptation = self._parts()
        flat, back = ravel_pytree(z)
        key, own = jax.random.split(key)
        inner = algorithm.init(flat, self._log_density(back, args, kwargs), own)
        zero = jnp.zeros((), flat.dtype)
        return BlackJAXState(
            i=jnp.zeros((), int),
            z=z,
            inner=inner,
            adaptation=adaptation.init(flat.size, flat.dtype),
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=jnp.zeros((), bool),
            num_steps=jnp.zeros((), int),
            energy_change=zero,
            rng_key=key,
        )

    def _step(self, state: BlackJAXState, args: Any, kwargs: Any) -> BlackJAXState:
        algorithm, adaptation = self._parts()
        _, back = ravel_pytree(state.z)
        log_density = self._log_density(back, args, kwargs)
        tuning = state.adaptation.tuning
        rng_key, own = jax.random.split(state.rng_key)

        def one(inner: Any, key: PRNGKeyArray) -> Any:
            return algorithm.step(key, inner, log_density, tuning)

        if self.steps_per_draw == 1:
            inner, report = one(state.inner, own)
            num_steps, diverging, accept_prob = report[2], report.diverging, report.accept_prob
        else:
            keys = jax.random.split(own, self.steps_per_draw)
            inner, reports = jax.lax.scan(one, state.inner, keys)
            report = jax.tree.map(lambda a: a[-1], reports)
            num_steps, diverging = reports.num_steps.sum(), reports.diverging.any()
            accept_prob = reports.accept_prob.mean()
            report = report._replace(accept_prob=accept_prob, diverging=diverging)
        update = partial(adaptation.update, state.adaptation, state.i, inner.position, report)
        i = state.i + 1
        count = jnp.where(i <= self._num_warmup, i, i - self._num_warmup)
        last = jnp.where(count == 1, 0.0, state.mean_accept_prob)
        return BlackJAXState(
            i=i,
            z=back(inner.position),
            inner=inner,
            adaptation=update(),
            accept_prob=accept_prob,
            mean_accept_prob=last + (accept_prob - last) / count.astype(accept_prob.dtype),
            diverging=diverging,
            num_steps=num_steps,
            energy_change=report.energy_change,
            rng_key=rng_key,
        )

    def refresh(self, state: BlackJAXState, model_args: Any, model_kwargs: Any) -> BlackJAXState:
        """The state with the log density that other blocks' moves have changed."""
        kwargs = {} if model_kwargs is None else model_kwargs
        flat, back = ravel_pytree(state.z)
        log_density = self._log_density(back, model_args, kwargs)
        if not hasattr(state.inner, "logdensity_grad"):
            algorithm, _ = self._parts()
            key = jax.random.fold_in(state.rng_key, 1)
            return state._replace(inner=algorithm.init(flat, log_density, key))
        value, gradient = jax.value_and_grad(log_density)(flat)
        inner = state.inner._replace(logdensity=value, logdensity_grad=gradient)
        return state._replace(inner=inner)
