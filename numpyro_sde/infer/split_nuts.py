"""NUTS that moves the innovations of a path exactly where they are standard normal.

Innovations z of a well-guided path have a posterior near N(0, I). The leapfrog step errs on that
law itself: its energy error grows with the dimension, so the step must shrink like the dimension
to the power -1/4 as the grid is refined, and the trees grow. Here the Hamiltonian is split into
the free motion of a standard normal, which is a rotation of (z, momentum) and is done exactly, and
the rest of the potential, which kicks:

    p <- p - (h / 2) (grad U(z) - z),   (z, p) <- rotate by the angle h,   p <- p - ...

A finer grid then changes neither step nor trees, as long as the rest of the potential settles.
Sources: Beskos, Pinski, Sanz-Serna and Stuart (2011), "Hybrid Monte Carlo on Hilbert spaces";
Shahbaba, Lan, Johnson and Neal (2014), "Split Hamiltonian Monte Carlo".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer import NUTS, init_to_median
from numpyro.infer.hmc import HMCState, momentum_generator
from numpyro.infer.hmc_util import (
    IntegratorState,
    build_tree,
    euclidean_kinetic_energy,
    warmup_adapter,
)
from numpyro.util import is_prng_key

from numpyro_sde.reparam.path import is_innovation

# Largest angle of a step: two doublings then go round more than half a circle and turn back,
# three gradients a draw. Nothing is gained by more, and at a full circle nothing would move.
_LARGEST_STEP = 1.2
# Numbers of steps of the shorter of two trees that may step over the turn together, and how near
# such a step size is left alone.
_TREES = (3, 7, 15, 31)
_MARGIN = 0.05


class SplitNUTS(NUTS):
    """NUTS for models with innovations, with the motion of a standard normal done exactly.

    Everything is NumPyro's NUTS but the integrator and the metric of the innovations, which is
    one and stays so. It draws from the same posterior whatever the innovations' posterior is; it
    is faster where that is near standard normal, that is with `reparam.GuidedReparam`, or with
    `reparam.InnovationReparam` and weak data. The number of gradients a draw then does not grow
    with the number of grid points.

    Args:
        model: the model, its paths reparametrised.
        innovations: names of the sites that are nearly standard normal a posteriori; None: all
            that the reparametrisations of this package make (`*_innov`).
        dense_mass: as in NUTS, of the remaining sites; True (the default): one dense block.
        init_strategy: where chains begin; the default is near the prior's medians, where the
            innovations are near zero and the path near the mean of its guide.
        target_accept_prob: as in NUTS; the default is the best for Hamiltonian Monte Carlo in many
            dimensions (Beskos et al. 2013, "Optimal tuning of the hybrid Monte Carlo algorithm").
            Raise it where draws diverge.
        **options: those of `numpyro.infer.NUTS`. `infer.guided_metric` gives a start and a metric
            that need little warm-up.

    Raises:
        TypeError: `model` is no function; an option that NUTS does not know.
        ValueError: at the start of the run, where the model has no such innovations.

    Extra fields are those of NUTS (`num_steps`, `accept_prob`, `diverging`, ...).

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
        >>> kernel = nsde.infer.SplitNUTS(guided)
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jax.numpy.array([0.8, 0.5, 0.2]))
        >>> mcmc.get_samples()["x"].shape
        (50, 3)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        innovations: Sequence[str] | None = None,
        dense_mass: bool | list[tuple[str, ...]] = True,
        init_strategy: Callable[..., Any] = init_to_median,
        target_accept_prob: float = 0.65,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        super().__init__(
            model,
            dense_mass=dense_mass,
            init_strategy=init_strategy,
            target_accept_prob=target_accept_prob,
            **options,
        )
        self._innovations = None if innovations is None else tuple(innovations)
        # NumPyro's kernel reads `_dense_mass` and `_inverse_mass_matrix` once the sites are
        # known; what was asked for is kept beside.
        self._asked_dense: Any = dense_mass
        self._asked_inverse: Any = options.get("inverse_mass_matrix")
        self._num_warmup = 0

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any = None,
        model_args: Any = (),
        model_kwargs: Any = None,
    ) -> HMCState:
        self._num_warmup = num_warmup
        kwargs = {} if model_kwargs is None else model_kwargs
        state = super().init(rng_key, num_warmup, init_params, model_args, kwargs)
        self._sample_fn = self._draw
        adapted = state.adapt_state
        return state._replace(adapt_state=adapted._replace(step_size=self._size(adapted)))

    def _init_state(
        self, rng_key: Any, model_args: Any, model_kwargs: Any, init_params: Any
    ) -> Any:
        start = super()._init_state(rng_key, model_args, model_kwargs, init_params)
        z = getattr(start, "z", start)
        batch = 0 if is_prng_key(rng_key) else 1  # axes of chains in one program
        names = self._innovation_names(z)
        others = tuple(sorted(set(z) - set(names)))
        if isinstance(self._asked_dense, bool):
            self._dense_mass = [others] if self._asked_dense and others else []
        given = self._asked_inverse
        if given is not None and not isinstance(given, dict):
            given = {others: given}
        size = sum(math.prod(z[name].shape[batch:]) for name in names)
        self._inverse_mass_matrix = {**(given or {}), names: jnp.ones(size)}
        return start

    def _innovation_names(self, z: dict[str, Any]) -> tuple[str, ...]:
        if self._innovations is not None:
            names = self._innovations
        else:
            names = tuple(filter(is_innovation, z))
        missing = sorted(set(names) - set(z))
        if missing or not names:
            raise ValueError(
                f"SplitNUTS: innovations {missing or names} are no latent sites of the model, "
                f"which has {sorted(z)}; reparametrise a path by GuidedReparam or "
                "InnovationReparam, or use numpyro.infer.NUTS"
            )
        return tuple(sorted(names))

    def _draw(self, state: HMCState, model_args: Any, model_kwargs: Any) -> HMCState:
        step = partial(self._step, model_args=model_args, model_kwargs=model_kwargs)
        return step(state) if is_prng_key(state.rng_key) else jax.vmap(step)(state)

    def _step(self, state: HMCState, model_args: Any, model_kwargs: Any) -> HMCState:
        potential = self.get_potential_fn(model_args, model_kwargs)
        names = self._innovation_names(state.z)
        key, momentum_key, tree_key = jax.random.split(state.rng_key, 3)
        adapted = state.adapt_state
        r = momentum_generator(state.z, adapted.mass_matrix_sqrt, momentum_key)
        depths = self._max_tree_depth
        depths = depths if isinstance(depths, tuple) else (depths, depths)
        warming = state.i < self._num_warmup
        tree = build_tree(
            split_step(potential, names, self._forward_mode_differentiation),
            euclidean_kinetic_energy,
            IntegratorState(state.z, r, state.potential_energy, state.z_grad),
            adapted.inverse_mass_matrix,
            adapted.step_size,
            tree_key,
            max_tree_depth=(jnp.where(warming, *depths), max(depths)),
        )
        now = IntegratorState(tree.z_proposal, r, tree.z_proposal_pe, tree.z_proposal_grad)
        accept = tree.sum_accept_probs / tree.num_proposals
        adapted = jax.lax.cond(
            warming,
            lambda: self._adapt(state.i, accept, now, adapted, names),
            lambda: adapted,
        )
        count = jnp.where(warming, state.i + 1, state.i + 1 - self._num_warmup)
        return state._replace(
            i=state.i + 1,
            z=now.z,
            z_grad=now.z_grad,
            potential_energy=now.potential_energy,
            energy=tree.z_proposal_energy,
            num_steps=tree.num_proposals,
            accept_prob=accept,
            mean_accept_prob=state.mean_accept_prob + (accept - state.mean_accept_prob) / count,
            diverging=tree.diverging,
            adapt_state=adapted,
            rng_key=key,
        )

    def _size(self, adapted: Any) -> Float[Array, " *chains"]:
        size = adapted.step_size
        return _turning(size) if self._adapt_step_size else size

    def _adapt(self, i: Array, accept: Array, now: Any, adapted: Any, names: Any) -> Any:
        """NumPyro's warm-up, after which the innovations have unit metric again."""
        _, update = warmup_adapter(
            self._num_warmup,
            adapt_step_size=self._adapt_step_size,
            adapt_mass_matrix=self._adapt_mass_matrix,
            dense_mass=self._dense_mass,
            target_accept_prob=self._target_accept_prob,
            regularize_mass_matrix=self._regularize_mass_matrix,
        )
        new = update(i, accept, now, adapted)
        one = jnp.ones_like(new.inverse_mass_matrix[names])
        return new._replace(
            step_size=self._size(new),
            inverse_mass_matrix={**new.inverse_mass_matrix, names: one},
            mass_matrix_sqrt={**new.mass_matrix_sqrt, names: one},
            mass_matrix_sqrt_inv={**new.mass_matrix_sqrt_inv, names: one},
        )


def _turning(step: Float[Array, " *chains"]) -> Float[Array, " *chains"]:
    """The step, or a longer one for which trees on a circle see that they turn.

    A tree of N steps of angle h sees it where sin(N h) < 0. Doubling N to 2 N + 1 steps over all
    of that half where N h < pi and (2 N + 1) h > 2 pi; the tree would go on to its largest depth.
    Such a step is lengthened till N steps see it: by a quarter at most, for half the gradients.
    """
    step = jnp.minimum(step, _LARGEST_STEP)
    for count in _TREES:
        low = (1.0 - _MARGIN) * 2.0 * jnp.pi / (2 * count + 1)
        high = (1.0 + _MARGIN) * jnp.pi / count
        step = jnp.where((step > low) & (step < high), high, step)
    return step


def split_step(
    potential: Callable[[dict[str, Array]], Float[Array, ""]],
    names: Sequence[str],
    forward_mode: bool = False,
) -> Callable[..., IntegratorState]:
    """One step of the split integrator, with the signature of NumPyro's `velocity_verlet`.

    The rotation is three shears, `z` by `sin h` times the momentum between two kicks of
    `tan(h / 2) z`, so that it merges with the kicks of the rest and the drift of other sites.
    """

    def slope(z: Any) -> Any:
        if not forward_mode:
            return jax.value_and_grad(potential)(z)
        return jax.jacfwd(lambda z: (potential(z),) * 2, has_aux=True)(z)[::-1]

    def update(
        step: Float[Array, ""], inverse_mass: Any, state: IntegratorState, *_: Any
    ) -> IntegratorState:
        turn, glide = jnp.tan(0.5 * step) - 0.5 * step, jnp.sin(step)

        def kick(r: Any, gradient: Any, z: Any) -> Any:
            r = jax.tree.map(lambda r, g: r - 0.5 * step * g, r, gradient)
            return {**r, **{name: r[name] - turn * z[name] for name in names}}

        z, r, _, gradient = state
        r = kick(r, gradient, z)
        velocity = euclidean_kinetic_energy._kinetic_grad(inverse_mass, r)
        z = {
            name: value + (glide * r[name] if name in names else step * velocity[name])
            for name, value in z.items()
        }
        value, gradient = slope(z)
        return IntegratorState(z, kick(r, gradient, z), value, gradient)

    return update
