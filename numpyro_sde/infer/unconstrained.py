"""What kernels over the unconstrained values of a model share.

Nothing that a run needs is kept in the kernel but the options: states resume in another process,
and a kernel pickles as its model does.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from numpyro.handlers import seed
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy
from numpyro.util import identity, is_prng_key

from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.runtime.entry import entry_point


class UnconstrainedKernel(MCMCKernel):
    """A kernel that moves all unconstrained values of a model together.

    Args:
        model: the model, or None with `potential_fn`.
        potential_fn: minus a log density of unconstrained values.
        init_strategy: where chains begin.
    """

    sample_field = "z"
    # NumPyro's mark of a kernel that goes on from a state without another `init`.
    _sample_fn = "sample"

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[[Any], Any] | None,
        init_strategy: Callable[..., Any],
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("give one of model and potential_fn")
        for name, value in (("model", model), ("potential_fn", potential_fn)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function, got {type(value).__name__}")
        self._model, self._potential_fn = model, potential_fn
        self._init_strategy = init_strategy
        self._num_warmup = 0

    @property
    def model(self) -> Callable[..., Any] | None:
        """The model."""
        return self._model

    @abstractmethod
    def _first(self, key: PRNGKeyArray, z: Any, args: Any, kwargs: Any) -> Any:
        """The state of a chain that begins at unconstrained values."""

    @abstractmethod
    def _step(self, state: Any, args: Any, kwargs: Any) -> Any:
        """The next state of one chain."""

    def _potential(self, args: Any, kwargs: Any) -> Callable[[Any], Any]:
        if self._potential_fn is not None:
            return self._potential_fn
        return partial(potential_energy, self._model, args, kwargs)

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> Any:
        self._num_warmup = num_warmup
        kwargs = {} if model_kwargs is None else model_kwargs
        single = is_prng_key(rng_key)  # chains in one program come with a batch of keys
        keys = (jax.random.split if single else jax.vmap(jax.random.split, out_axes=1))(rng_key)
        rng_key, model_key = keys[0], keys[1]
        z = init_params
        if self._model is not None and z is None:
            z = initialize_model(
                model_key,
                self._model,
                init_strategy=self._init_strategy,
                model_args=model_args,
                model_kwargs=kwargs,
            ).param_info.z
        if z is None:
            raise ValueError("a kernel with potential_fn needs init_params in MCMC.run")
        z = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), z)
        if self._model is None:
            first = partial(self._first, args=model_args, kwargs=kwargs)
            return jax.jit(first if single else jax.vmap(first))(rng_key, z)
        return with_data_as_arguments(
            self._model,
            model_args,
            kwargs,
            lambda given: _first_state(self, num_warmup, single, given, rng_key, z),
        )

    def sample(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        kwargs = {} if model_kwargs is None else model_kwargs
        if is_prng_key(state.rng_key):
            return self._step(state, model_args, kwargs)
        return jax.vmap(lambda state: self._step(state, model_args, kwargs))(state)

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Callable[..., Any]:
        """Constrain the values and add deterministic sites."""
        if self._model is None:
            return identity
        kwargs = {} if model_kwargs is None else model_kwargs
        return partial(constrain_fn, self._model, model_args, kwargs, return_deterministic=True)

    def get_constrain_fn(
        self, model_args: Any, model_kwargs: Any, *, return_deterministic: bool = False
    ) -> Callable[..., Any]:
        """Map unconstrained values to constrained ones."""
        if self._model is None:
            return identity
        kwargs = {} if model_kwargs is None else model_kwargs
        # As a block of Gibbs it is asked before the sites of other blocks have values.
        return partial(
            constrain_fn,
            seed(self._model, 0),
            model_args,
            kwargs,
            return_deterministic=return_deterministic,
        )

    def wrap_model(self, wrapper: Callable[..., Any]) -> UnconstrainedKernel:
        """The same kernel on a wrapped model."""
        if self._model is None:
            raise ValueError("wrap_model needs a kernel that was made with a model")
        new = copy.copy(self)
        new._model = wrapper(self._model)
        return new

    def refresh(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        """The state after other blocks have moved the rest of the model."""
        del model_args, model_kwargs
        return state


@entry_point
def _first_state(
    kernel: UnconstrainedKernel,
    num_warmup: int,  # noqa: ARG001
    single: bool,
    arguments: Any,
    key: PRNGKeyArray,
    z: Any,
) -> Any:
    """First states of a kernel's chains; compiled once for the length of its warm-up."""
    args, kwargs = released(arguments)
    first = partial(kernel._first, args=args, kwargs=kwargs)
    return (first if single else jax.vmap(first))(key, z)
