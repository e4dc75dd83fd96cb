"""Parameters and weights of an unknown drift given a path: a block of NumPyro's Gibbs sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import NUTS
from numpyro.infer.hmc import HMC
from numpyro.infer.util import unconstrain_fn

from numpyro_sde.collapse import collapse
from numpyro_sde.distributions.collapsed import draw_weights
from numpyro_sde.infer.block import BlockKernel


class CollapsedFieldState(NamedTuple):
    """State of `CollapsedField`.

    Attributes:
        z: values of the sites it updates, weights among them.
        inner: state of the kernel of the other parameters.
        rng_key: key of the next draw of weights.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.CollapsedFieldState._fields
        ('z', 'inner', 'rng_key')
    """

    z: dict[str, Array]
    inner: Any
    rng_key: PRNGKeyArray


class CollapsedField(BlockKernel):
    """Update parameters with the weights of an unknown drift integrated out, then the weights.

    A block of `numpyro.infer.gibbs.Gibbs` for latent paths with a learned drift:
    `Gibbs([(ConditionalSMC(model), ["x"]), (CollapsedField(model, "f"), None)])`. Given the path,
    the weights are normal (`handlers.collapse`): the other parameters move on the density without
    them, by NUTS, and the weights are then drawn exactly. Nothing of the funnel between amplitude
    and weights is left, and a path's new shape is at once in both.

    Args:
        model: the model, as it is.
        name: the field's name, as given to `register`.
        inner: kernel of the other parameters, `NUTS` or `HMC`, or a function that makes one of a
            model.
        **options: keyword arguments of `inner`.

    Raises:
        ValueError: in use, what `handlers.collapse` refuses; run outside of Gibbs.
        TypeError: an inner kernel that is no HMC.

    When not to use it: an observed path, where NUTS on `handlers.collapse(model, name)` is all.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> from numpyro.infer.gibbs import Gibbs
        >>> prior = nsde.fields.HSGP(dim=1, box=3.0, num=4)
        >>> def model(y):
        ...     f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=1.0)
        ...     sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
        ...     law = nsde.SDEPath(sde, np.arange(4) * 0.2, dist.Normal(0.0, 0.5))
        ...     x = numpyro.sample("x", law)
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y)
        >>> blocks = [(nsde.infer.ConditionalSMC(model, num_particles=8), ["x"]),
        ...           (nsde.infer.CollapsedField(model, "f"), None)]
        >>> mcmc = MCMC(Gibbs(blocks), num_warmup=5, num_samples=5, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.1, 0.2, 0.0, -0.1]))
        >>> {name: value.shape for name, value in sorted(mcmc.get_samples().items())}
        {'f/amplitude': (5,), 'f/z': (5, 4), 'x': (5, 4)}
    """

    sample_field = "z"

    def __init__(
        self,
        model: Callable[..., Any],
        name: str,
        inner: Callable[..., Any] = NUTS,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        self._model, self.name = model, name
        self._make_inner, self._options = inner, options
        self._bind()

    def _bind(self) -> None:
        self._collapsed = collapse(self._model, self.name)
        self._inner = self._make_inner(self._collapsed, **self._options)
        if not isinstance(self._inner, HMC):
            raise TypeError(
                "inner must make an HMC or NUTS kernel of a model, got "
                f"{type(self._inner).__name__}"
            )

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z",)

    def get_diagnostics_str(self, state: CollapsedFieldState) -> str:
        return self._inner.get_diagnostics_str(state.inner)

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> CollapsedFieldState:
        if not init_params:
            raise ValueError(
                "CollapsedField is a block of numpyro.infer.gibbs.Gibbs, which hands it values to "
                "begin with: Gibbs([(ConditionalSMC(model), ['x']), (CollapsedField(model, 'f'), "
                "None)])"
            )
        kwargs = {} if model_kwargs is None else model_kwargs
        inner_key, weight_key, rng_key = jax.random.split(rng_key, 3)
        own = {k: jnp.asarray(v) for k, v in init_params.items() if k not in self._weight_sites()}
        collapsed = seed(self._collapsed, inner_key)
        free = unconstrain_fn(collapsed, model_args, kwargs, own)
        inner = self._inner.init(inner_key, num_warmup, free, model_args, kwargs)
        values = self._values(inner, weight_key, model_args, kwargs)
        return CollapsedFieldState(values, inner, rng_key)

    def sample(
        self, state: CollapsedFieldState, model_args: Any, model_kwargs: Any
    ) -> CollapsedFieldState:
        kwargs = {} if model_kwargs is None else model_kwargs
        weight_key, rng_key = jax.random.split(state.rng_key)
        inner = self._inner.sample(state.inner, model_args, kwargs)
        values = self._values(inner, weight_key, model_args, kwargs)
        return CollapsedFieldState(values, inner, rng_key)

    def _weight_sites(self) -> tuple[str, str]:
        return f"{self.name}/z", self.name

    def _values(self, inner: Any, key: PRNGKeyArray, args: Any, kwargs: Any) -> dict[str, Array]:
        """Parameters as they are, and a draw of the weights given them and the path."""
        z = getattr(inner, self._inner.sample_field)
        values = dict(self._inner.get_constrain_fn(args, kwargs)(z))
        run = trace(substitute(seed(self._collapsed, key), data=values))
        recorded = run.get_trace(*args, **kwargs)
        assert self._collapsed.path is not None
        assert self._collapsed.site is not None
        site = recorded[self._collapsed.path]
        law = site["fn"]
        values[self._collapsed.site] = draw_weights(
            law.weights_given(site["value"]), law.prior, key
        )
        return values

    def refresh(
        self, state: CollapsedFieldState, model_args: Any, model_kwargs: Any
    ) -> CollapsedFieldState:
        """The state after other blocks have moved: the density anew."""
        kwargs = {} if model_kwargs is None else model_kwargs
        return state._replace(inner=self._inner.refresh(state.inner, model_args, kwargs))

    def wrap_model(self, wrapper: Callable[..., Any]) -> CollapsedField:
        """The same kernel on a wrapped model."""
        new = super().wrap_model(wrapper)
        new._bind()
        return new
