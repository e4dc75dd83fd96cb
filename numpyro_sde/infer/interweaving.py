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

from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import reparam
from numpyro.infer.gibbs import conditioned, with_conditioning
from numpyro.infer.mcmc import MCMCKernel

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.infer.conditional import ConditionalSMC
from numpyro_sde.models.stack import peel
from numpyro_sde.reparam.path import InnovationReparam


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
        held = self._innovations(path_state.z, self._values(rest_state, args, kwargs), args, kwargs)
        given = with_conditioning(kwargs, held)
        own = own._replace(**{self._kernel.sample_field: _sites(rest_state, self._rest)})
        own = self._kernel.sample(self._kernel.refresh(own, args, given), args, given)
        moved = rest_state._replace(**{self._rest.sample_field: _sites(own, self._kernel)})
        values = self._values(moved, args, kwargs)
        paths = dict(path_state.z)
        for name in paths:
            law = self._law(name, paths, values, args, kwargs)
            start: Any = held.get(f"{name}_init", law.fixed_start)
            paths[name] = law.forward(start, held[f"{name}_innov"]).astype(paths[name].dtype)
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
        law = self._paths._observed(args, given, name, paths).path
        if not isinstance(law, SDEPath):
            raise TypeError(f"path {name!r} follows a {type(law).__name__}: it has no innovations")
        law.scheme.require_smooth("ParticleGibbs(interweave=True)")
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
