"""The same reaction network under another law, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.projection import known_start
from numpyro_sde.distributions.reactions import check_counts
from numpyro_sde.handlers import _ChangePath
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.laws import AbstractLaw


class approximate(_ChangePath):  # noqa: N801
    """The same model with its reaction networks under another law: does the answer depend on it?

    Args:
        fn: the model.
        law: one of `nsde.laws`, for every path of a network.

    Raises:
        TypeError: a law that is none; a discrete start under a law of real numbers.
        ValueError: a path that is not of a network; a start that is not made of counts under a law
            of counts.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro_sde as nsde
        >>> def model():
        ...     decay = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
        ...     numpyro.sample("x", nsde.ReactionPath(decay, [0.0, 1.0], [20.0]))
        >>> exact = nsde.handlers.approximate(model, law=nsde.laws.Jump())
        >>> site = numpyro.handlers.trace(numpyro.handlers.seed(exact, 0)).get_trace()["x"]
        >>> type(site["fn"].scheme).__name__
        'Gillespie'
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, law: AbstractLaw | None = None
    ) -> None:
        if not isinstance(law, AbstractLaw):
            hint = f"; call it, law={law.__name__}()" if isinstance(law, type) else ""
            raise TypeError(f"law must be one of nsde.laws, got {law!r}{hint}")
        self.law = law
        super().__init__(fn)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:
        net = path.sde
        if not isinstance(net, ReactionNetwork):
            what = type(net if isinstance(path, SDEPath) else path).__name__
            raise ValueError(
                f"approximate: path {name!r} is of a {what}; laws are those of an "
                "nsde.ReactionNetwork. Other SDEs take handlers.discretize(model, scheme)"
            )
        if self.law.counts:
            start = known_start(path)
            if start is not None:
                check_counts(f"approximate: the start of path {name!r}", start)
            elif path.fixed_start is None and not path.init.is_discrete:
                raise ValueError(
                    f"approximate: path {name!r} starts with a continuous "
                    f"{type(path.init).__name__}, but {type(self.law).__name__} is a law of "
                    "counts: give whole numbers or a discrete distribution"
                )
        scheme = self.law.scheme_from(net, path.init, path.times)
        return path.replace(scheme=scheme), np.arange(path.num_times)
