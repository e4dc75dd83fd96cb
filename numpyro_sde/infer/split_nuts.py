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
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.handlers import seed
from numpyro.infer import NUTS, init_to_median
from numpyro.infer.hmc import HMCState, momentum_generator
from numpyro.infer.hmc_util import (
    IntegratorState,
    build_tree,
    euclidean_kinetic_energy,
)
from numpyro.infer.util import ParamInfo, constrain_fn, potential_energy
from numpyro.util import is_prng_key

from numpyro_sde.infer.searched import (
    Adaptation,
    draw_near_mode,
    first_state,
    search_start,
    start_near_mode,
)
from numpyro_sde.models.stack import progress_is_shown
from numpyro_sde.reparam.path import is_innovation
from numpyro_sde.reparam.planning import Found
from numpyro_sde.runtime.progress import told

# Largest angle of a step: three doublings then go round more than half a circle and turn back,
# seven gradients a draw. Steps of 1.2 need three, for half the effective draws at most; at a full
# circle nothing would move.
_LARGEST_STEP = 0.85
# Numbers of steps of the shorter of two trees that may step over the turn together, and how near
# such a step size is left alone.
_TREES = (7, 15, 31)
_MARGIN = 0.05


_FEW_GRADIENTS, _MANY_DRAWS = 0.65, 0.8
# A dense metric estimated from fewer draws for each dimension is worse than the curvature at the
# mode: that of 103 parameters of 50 neurons from 200 draws left 4 effective draws of 300.
_DRAWS_A_DIMENSION = 5


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
        init_strategy: where chains begin. None: for guided paths a draw of the normal
            approximation at the mode that their search has found, with the curvature there as the
            first metric of the other sites; else near the prior's medians.
        target_accept_prob: as in NUTS. None: 0.65, the best in many dimensions for a given number
            of gradients (Beskos et al. 2013, "Optimal tuning of the hybrid Monte Carlo
            algorithm"); 0.8 where guided paths were searched, since a draw is worth more then and
            gradients are few. Raise it where draws diverge.
        **options: those of `numpyro.infer.NUTS`.

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
        init_strategy: Callable[..., Any] | None = None,
        target_accept_prob: float | None = None,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        super().__init__(
            model,
            dense_mass=dense_mass,
            init_strategy=init_to_median if init_strategy is None else init_strategy,
            target_accept_prob=_FEW_GRADIENTS if target_accept_prob is None else target_accept_prob,
            **options,
        )
        self._asked_accept = target_accept_prob
        self._innovations = None if innovations is None else tuple(innovations)
        # NumPyro's kernel reads `_dense_mass` and `_inverse_mass_matrix` once the sites are
        # known; what was asked for is kept beside.
        self._asked_dense: Any = dense_mass
        self._asked_inverse: Any = options.get("inverse_mass_matrix")
        self._num_warmup = 0
        self._keeps_curvature = False
        heuristic = options.get("find_heuristic_step_size", False)
        self._may_search = init_strategy is None and not heuristic

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
        state = None
        if self._may_search and init_params is None:
            state = self._searched_state(rng_key, model_args, kwargs)
        if state is None:
            try:
                state = super().init(rng_key, num_warmup, init_params, model_args, kwargs)
            except RuntimeError as error:
                if "enumerate support" not in str(error):
                    raise
                raise ValueError(
                    "SplitNUTS moves real numbers, and the model has a discrete latent site: "
                    "integrate a JumpPath out by handlers.marginalize(model, "
                    "method=filters.Forward()), or draw it by infer.ConditionalForward in a Gibbs "
                    "sampler"
                ) from error
        self._sample_fn = self._draw
        adapted = state.adapt_state
        return state._replace(adapt_state=adapted._replace(step_size=self._size(adapted)))

    def _searched_state(self, rng_key: Any, args: Any, kwargs: Any) -> HMCState | None:
        """A state from what guided paths found; None where they found nothing."""
        shown = progress_is_shown(sys._getframe(1))
        with told("looking for the mode along guided paths", shown):
            found = search_start(self._model, args, kwargs)
        if found is None:
            return None
        if shown:
            print("compiling the sampler: the bar moves when that is done", file=sys.stderr)
        model = seed(self._model, 0)
        self._potential_fn_gen = lambda *args, **kwargs: partial(
            potential_energy, model, args, kwargs
        )
        self._postprocess_fn = lambda *args, **kwargs: partial(
            constrain_fn, model, args, kwargs, return_deterministic=True
        )
        # Supports may depend on values: constraining runs the model.
        self._inv_transforms: Any = {}
        self._dynamic_support = True
        self._set_metric(found.mode, batch=0, found=found)
        if self._asked_accept is None:
            self._target_accept_prob = _MANY_DRAWS
        begin = partial(
            first_state,
            self._adaptation(),
            inverse_mass=self._inverse_mass_matrix,
            step_size=jnp.asarray(self._step_size, jnp.result_type(float)),
        )

        def traced(key: Any) -> HMCState:
            draw_key, key = jax.random.split(key)
            z = draw_near_mode(found, partial(jax.random.normal, draw_key))
            potential = self.get_potential_fn(args, kwargs)
            value, slope = jax.value_and_grad(potential)(z)
            return begin(start=ParamInfo(z, value, slope), key=key)

        single = is_prng_key(rng_key)
        if isinstance(rng_key, jax.core.Tracer):  # chains in parallel
            return traced(rng_key) if single else jax.vmap(traced)(rng_key)
        if single:
            start = start_near_mode(found, rng_key)
            return None if start is None else begin(start=start, key=rng_key)
        starts = [start_near_mode(found, key) for key in rng_key]
        if any(start is None for start in starts):
            return None
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
        return jax.vmap(lambda start, key: begin(start=start, key=key))(stacked, rng_key)

    def _init_state(
        self, rng_key: Any, model_args: Any, model_kwargs: Any, init_params: Any
    ) -> Any:
        start = super()._init_state(rng_key, model_args, model_kwargs, init_params)
        # Chains in one program come with an axis of their own.
        self._set_metric(getattr(start, "z", start), 0 if is_prng_key(rng_key) else 1)
        return start

    def _set_metric(self, z: Any, batch: int, found: Found | None = None) -> None:
        names = self._innovation_names(z)
        others = tuple(sorted(set(z) - set(names)))
        if isinstance(self._asked_dense, bool):
            self._dense_mass = [others] if self._asked_dense and others else []
        given = self._asked_inverse
        if given is not None and not isinstance(given, dict):
            given = {others: given}
        self._keeps_curvature = False
        if given is None and found is not None and found.names == others:
            given = self._curvature(others, found)
            dense = self._asked_dense is True and found.covariance is not None
            free = sum(math.prod(z[name].shape[batch:]) for name in others) if dense else 0
            self._keeps_curvature = _DRAWS_A_DIMENSION * free > self._num_warmup
        size = sum(math.prod(z[name].shape[batch:]) for name in names)
        self._inverse_mass_matrix = {**(given or {}), names: jnp.ones(size)}

    def _curvature(self, others: tuple[str, ...], found: Found) -> dict[tuple[str, ...], Any]:
        """The first metric of the sites that are no innovations; empty for NumPyro's."""
        if found.covariance is None or not isinstance(self._asked_dense, bool):
            return {}
        whole = found.covariance if self._asked_dense else np.diagonal(found.covariance)
        return {others: jnp.asarray(whole, jnp.result_type(float))}

    def _adaptation(self) -> Adaptation:
        return Adaptation(
            self._num_warmup,
            self._adapt_step_size,
            self._adapt_mass_matrix and not self._keeps_curvature,
            tuple(tuple(block) for block in self._dense_mass),
            self._target_accept_prob,
            self._regularize_mass_matrix,
        )

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
        # One vector for each block of the metric: trees hold ten copies of a position.
        packing = _Packing.of(adapted.inverse_mass_matrix, state.z)
        metric = packing.relabel(adapted.inverse_mass_matrix)
        z, slope = packing.pack(state.z), packing.pack(state.z_grad)
        r = momentum_generator(z, packing.relabel(adapted.mass_matrix_sqrt), momentum_key)
        depths = self._max_tree_depth
        depths = depths if isinstance(depths, tuple) else (depths, depths)
        warming = state.i < self._num_warmup
        tree = build_tree(
            split_step(
                lambda z: potential(packing.unpack(z)),
                packing.labels_of(names),
                self._forward_mode_differentiation,
            ),
            euclidean_kinetic_energy,
            IntegratorState(z, r, state.potential_energy, slope),
            metric,
            adapted.step_size,
            tree_key,
            max_tree_depth=(jnp.where(warming, *depths), max(depths)),
        )
        now = IntegratorState(
            packing.unpack(tree.z_proposal),
            None,
            tree.z_proposal_pe,
            packing.unpack(tree.z_proposal_grad),
        )
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
        _, update = self._adaptation().adapter()
        new = update(i, accept, now, adapted)
        one = jnp.ones_like(new.inverse_mass_matrix[names])
        return new._replace(
            step_size=self._size(new),
            inverse_mass_matrix={**new.inverse_mass_matrix, names: one},
            mass_matrix_sqrt={**new.mass_matrix_sqrt, names: one},
            mass_matrix_sqrt_inv={**new.mass_matrix_sqrt_inv, names: one},
        )


class _Packing:
    """The sites of each block of a metric as one vector.

    Args:
        blocks: names of the sites of each block, in the order in which the metric has them.
        shapes: shapes of the sites.
    """

    def __init__(
        self, blocks: tuple[tuple[str, ...], ...], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.blocks, self.shapes = blocks, shapes

    @classmethod
    def of(cls, metric: dict[tuple[str, ...], Any], z: dict[str, Array]) -> _Packing:
        return cls(tuple(metric), {name: jnp.shape(value) for name, value in z.items()})

    def relabel(self, metric: dict[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
        return {(str(i),): metric[block] for i, block in enumerate(self.blocks)}

    def labels_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(i) for i, block in enumerate(self.blocks) if set(block) <= set(names))

    def pack(self, z: dict[str, Array]) -> dict[str, Array]:
        return {
            str(i): jnp.concatenate([jnp.ravel(z[name]) for name in block])
            for i, block in enumerate(self.blocks)
        }

    def unpack(self, packed: dict[str, Array]) -> dict[str, Array]:
        z = {}
        for i, block in enumerate(self.blocks):
            start = 0
            for name in block:
                stop = start + math.prod(self.shapes[name])
                z[name] = jnp.reshape(packed[str(i)][start:stop], self.shapes[name])
                start = stop
        return z


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
