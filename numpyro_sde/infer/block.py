"""What kernels share that are blocks of a Gibbs sampler and keep their sites as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import identity


class BlockKernel(MCMCKernel):
    """A kernel that keeps its sites unchanged and, unless it says so, nothing of the others.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.infer.block import BlockKernel
        >>> issubclass(nsde.infer.ConditionalSMC, BlockKernel)
        True
    """

    _model: Callable[..., Any]

    def refresh(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        """The state: nothing of the other sites is kept in it."""
        del model_args, model_kwargs
        return state

    def wrap_model(self, wrapper: Callable[..., Any]) -> Self:
        """The same kernel on a wrapped model."""
        new = copy.copy(self)
        new._model = wrapper(self._model)
        return new

    def get_constrain_fn(self, model_args: Any, model_kwargs: Any) -> Callable[..., Any]:
        """The identity: sites are kept as they are."""
        del model_args, model_kwargs
        return identity
