"""A second move of the parameters in each sweep of a Gibbs sampler, the innovations held.

Given a path, parameters of its diffusion hardly move: the path's own variation shows them. Given
the standard normals that make the path they move with it. Moving them in both ways in each sweep is
at least as good as the better of the two, without knowing which that is (Yu and Meng 2011, "To
center or not to center: that is not the question"; for volatilities Kastner and Fruhwirth-Schnatter
2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import reparam
from numpyro.infer.gibbs import any_changed, conditioned, with_conditioning
from numpyro.infer.mcmc import MCMCKernel

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.infer.conditional import ConditionalSMC
from numpyro_sde.models.stack import peel
from numpyro_sde.reparam.path import InnovationReparam
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.memory import MemoryScheme


class _Whiten:
    """The reparametrisation of each site; a class, so that kernels pickle."""

    def __init__(self, sites: tuple[str, ...] | None) -> None:
        self.sites = sites

    def __call__(self, site: Any) -> InnovationReparam | None:
        law, _ = peel(site["fn"])
        latent = isinstance(law, SDEPath) and not site["is_observed"]
        chosen = self.sites is None or site["name"] in self.sites
        return InnovationReparam() if latent and chosen else None


class Interweaving:
    """Moves the sites that are no paths, and the paths with them.

    Args:
        model: the model.
        inner: makes the kernel that moves them.
        options: its keyword arguments.
        paths: the kernel of the paths.
        rest: the kernel of all other sites given the paths.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        inner: Callable[..., MCMCKernel],
        options: dict[str, Any],
        paths: ConditionalSMC,
        rest: MCMCKernel,
    ) -> None:
        whitened = reparam(model, config=_Whiten(paths.sites))
        self._kernel = inner(whitened, **options).wrap_model(conditioned)
        self._paths, self._rest = paths, rest

    def wrapped(self, wrapper: Any, paths: ConditionalSMC, rest: MCMCKernel) -> Interweaving:
        """The same of a wrapped model."""
        new = object.__new__(Interweaving)
        new._kernel = self._kernel.wrap_model(wrapper)
        new._paths, new._rest = paths, rest
        return new

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        states: tuple[Any, ...],
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """The state of the second kernel.

        Raises:
            TypeError: paths whose scheme is no map of normal innovations.
            ValueError: innovations that their path does not determine.
        """
        path_state, rest_state = states
        held = self._innovations(path_state.z, self._values(rest_state, args, kwargs), args, kwargs)
        given = with_conditioning(kwargs, held)
        z = getattr(rest_state, self._rest.sample_field)
        return self._kernel.init(rng_key, num_warmup, z, args, given)

    def move(
        self, states: tuple[Any, ...], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any, Any]:
        """New states of the paths, of the rest and of the second kernel."""
        path_state, rest_state, own = states
        before, z = dict(path_state.z), _sites(rest_state, self._rest)
        held = self._innovations(before, self._values(rest_state, args, kwargs), args, kwargs)
        given = with_conditioning(kwargs, held)
        own = own._replace(**{self._kernel.sample_field: z})
        own = self._kernel.sample(self._kernel.refresh(own, args, given), args, given)
        new_z = _sites(own, self._kernel)
        moved = rest_state._replace(**{self._rest.sample_field: new_z})
        values = self._values(moved, args, kwargs)
        after = {}
        for name, path in before.items():
            law = self._law(name, before, values, args, kwargs)
            start: Any = held.get(f"{name}_init", law.fixed_start)
            after[name] = law.forward(start, held[f"{name}_innov"]).astype(path.dtype)
        # A path whose parameters have stayed stays as it is, to the last digit.
        finite = [jnp.all(jnp.isfinite(path)) for path in after.values()]
        taken = jnp.all(jnp.stack([any_changed(z, new_z), *finite]))

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(taken, new, old)

        paths, z = jax.tree.map(choose, (after, new_z), (before, z))
        moved = moved._replace(**{self._rest.sample_field: z})
        moved = self._rest.refresh(moved, args, with_conditioning(kwargs, paths))
        return path_state._replace(z=paths), moved, own

    def _values(self, rest_state: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Array]:
        """Constrained values of the sites that are no paths."""
        constrain = self._rest.get_constrain_fn(args, kwargs)
        z = _sites(rest_state, self._rest)
        return {name: value for name, value in constrain(z).items() if name in z}

    def _law(
        self, name: str, paths: dict[str, Array], values: dict[str, Array], args: Any, kwargs: Any
    ) -> SDEPath:
        given = with_conditioning(kwargs, values)
        reading = self._paths._reading(args, given, name, paths)
        observed = reading.observed[name]
        law = observed.path
        if not isinstance(law, SDEPath):
            raise TypeError(f"path {name!r} follows a {type(law).__name__}: it has no innovations")
        if reading.paths[name].intervened:
            raise ValueError(f"path {name!r} is cut off from its data by handlers.do")
        scheme = law.scheme
        one_to_one = isinstance(scheme, GaussianScheme) and not isinstance(scheme, MemoryScheme)
        if not one_to_one or law.innovation_shape[1:] != law.state_shape or not scheme.smooth:
            raise ValueError(
                f"path {name!r}: the innovations of {type(scheme).__name__} are not one to one "
                "with the states, so that they cannot be held while parameters move"
            )
        if any(statement.structure.exact for statement, _ in observed.data):
            raise ValueError(
                f"path {name!r} is seen without noise (a Delta emission): no parameter can move "
                "with its innovations held"
            )
        return law

    def _innovations(
        self, paths: dict[str, Array], values: dict[str, Array], args: Any, kwargs: Any
    ) -> dict[str, Array]:
        """Values of the sites that make the paths."""
        found = {}
        for name, path in paths.items():
            law = self._law(name, paths, values, args, kwargs)
            start, found[f"{name}_innov"] = law.inverse(path)
            if law.fixed_start is None:
                found[f"{name}_init"] = start
        return found


def _sites(state: Any, kernel: MCMCKernel) -> dict[str, Array]:
    sites: dict[str, Array] = getattr(state, kernel.sample_field)
    return sites
