"""Effect handlers: the same model with its paths treated otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_sde.collapse import collapse
from numpyro_sde.distributions.clocks import Clock, remember_value, times_shown
from numpyro_sde.distributions.marginal import IntegratedPath, MarginalPath, NoValue, no_value
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.statement import Rows, Statement
from numpyro_sde.grid import TimeGrid
from numpyro_sde.models.reading import stand_in, view_of
from numpyro_sde.models.stack import (
    conditions_on,
    explicit_scale,
    handlers_outside,
    intervenes_on,
    path_law,
    peel,
    plates_around,
    power_of,
    substitutes,
    value_outside,
)
from numpyro_sde.models.survey import Survey, survey
from numpyro_sde.models.timewise import times_of_path
from numpyro_sde.noise import AbstractNoise
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.statespace.model import AbstractFilter


def observed_paths(fn: Callable[..., Any], args: Any, kwargs: Any) -> set[str]:
    """Names of the latent path sites of a model that it observes; nothing is computed."""
    return set(survey(fn, args, kwargs).observed.values())


class marginalize(Messenger):  # noqa: N801
    """Integrate out every path that the model observes.

    The observation sites get the marginal law of the data: their `log_prob` is the filter's
    log likelihood, their draws simulate path and data. So priors, `Predictive`, `condition`
    (inside or outside), `log_likelihood` and every engine work as on any model. A second
    `observe` on the same path gets the law given the first one's data. Paths that no
    `observe` sees stay latent.

    Use it as `marginalize(model, method=...)`, as a decorator, or as a context manager around
    the model's code (then name the `sites` if some paths are not observed).

    Args:
        fn: the model.
        method: the filter, one of `nsde.filters`; `Kalman()` is exact where the model is
            linear and Gaussian.
        sites: names of the path sites to integrate out; None for all that are observed.

    Raises:
        TypeError: a method that is no filter, or a model that uses the path's value elsewhere
            than in `observe`.
        ValueError: a path that is conditioned on, a name in `sites` that is no path, or a
            model that the method cannot treat.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(5.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(marginal, 0)).get_trace()
        >>> list(sites)
        ['rate', 'y']
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        method: AbstractFilter,
        sites: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(method, AbstractFilter):
            hint = "; call it, method=Kalman()" if isinstance(method, type) else ""
            raise TypeError(f"method must be one of nsde.filters, got {method!r}{hint}")
        if isinstance(sites, str):
            raise TypeError(f"sites must be a list of names, got the string {sites!r}")
        self.method = method
        self.sites = None if sites is None else frozenset(sites)
        self._active: frozenset[str] | None = self.sites
        # Of the last run: who uses the paths, their stand-ins, and the values of other sites.
        self._survey: Survey | None = None
        self._arguments: tuple[Any, Any] = ((), {})
        self.paths: dict[str, IntegratedPath] = {}
        self._known: dict[str, Any] = {}
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fn is not None:
            self._survey = self._look(args, kwargs)
            self._arguments = args, kwargs
            if self.sites is None:
                self._active = frozenset(self._survey.observed.values())
            hidden = self._survey.returned
        else:
            hidden = {}
        result = super().__call__(*args, **kwargs)
        for path in hidden.keys() & (self._active or set()):
            leaves, treedef = jax.tree_util.tree_flatten(result)
            leaves = [
                NoValue(path) if made else leaf
                for leaf, made in zip(leaves, hidden[path], strict=True)
            ]
            result = jax.tree_util.tree_unflatten(treedef, leaves)
        return result

    def _look(self, args: Any, kwargs: Any) -> Survey:
        """Who uses the paths; anything but `observe` must not use one that is integrated out."""
        assert self.fn is not None
        try:
            found = survey(self.fn, args, kwargs)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise TypeError(no_value(", ".join(sorted(self.sites or {"?"})))) from error
        treated = set(found.observed.values()) if self.sites is None else self.sites
        for uses in (found.densities, found.values):
            for path in sorted(treated & set(uses)):
                raise TypeError(f"{no_value(path)} (it is used in {uses[path]})")
        return found

    def __enter__(self) -> None:
        self.paths, self._known = {}, {}
        super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._known = {}
        if self.fn is not None:  # nothing of a trace is kept
            self.paths, self._survey, self._arguments = {}, None, ((), {})
        # JAX refuses an unknown type before it asks the object: say what the object is.
        if isinstance(exc_value, TypeError) and IntegratedPath.__name__ in str(exc_value):
            names = ", ".join(sorted(self._active or {"?"}))
            raise TypeError(no_value(names)) from exc_value

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        law, mask = peel(msg["fn"])
        if isinstance(law, MarginalPath):
            if law.stand_in is not None and law.stand_in.owner is self:
                self._state(msg, law, mask)
        elif isinstance(law, EmissionPath):
            owner = None if self._survey is None else self._survey.observed.get(msg["name"])
            if owner in self.paths:
                self._state(msg, self._stated(msg["name"], owner, law), mask)
        elif isinstance(law, AbstractPathLaw):
            self._integrate(msg, law, mask)
        elif self.sites is not None and msg["name"] in self.sites:
            raise ValueError(
                f"marginalize: site {msg['name']!r} in sites is a {type(msg['fn']).__name__}, not "
                "an SDEPath or a JumpPath"
            )

    def _integrate(self, msg: Any, path: AbstractPathLaw, mask: Any) -> None:
        """Put a stand-in in the place of a path."""
        name = msg["name"]
        chosen = self._active is None or name in self._active
        if not chosen or msg["is_observed"] or intervenes_on(name, self):
            return
        if conditions_on(name, self):
            raise ValueError(
                f"marginalize: path {name!r} is conditioned on outside the handler; put "
                "condition inside, marginalize(condition(model, data), ...), to keep it"
            )
        if substitutes(name, self):
            raise ValueError(
                f"marginalize: path {name!r} is integrated out, but a value is substituted for it "
                "outside the handler; leave it out of the values, or use the model itself"
            )
        plates = plates_around(msg)
        if power_of(msg["scale"], plates, plates) is not None or explicit_scale(self):
            raise ValueError(
                f"marginalize: path {name!r} stands inside handlers.scale: the power of its law is "
                "no law of a path. Scale the observe statements alone, or leave the path latent "
                "with marginalize(..., sites=[...])"
            )
        shape = msg["fn"].shape()
        lead = shape[: len(shape) - path.event_dim]
        index, seen_by_model = np.arange(path.num_times), path
        for handler in self._outer_changes():
            path, seen = handler.change(name, path)
            index = seen[index]
        placeholder = IntegratedPath(
            name,
            path,
            self._method(),
            lead,
            mask=_as_mask(mask),
            plates=frozenset(plates),
            owner=self,
            index=index,
        )
        self.paths[name] = placeholder
        msg["value"] = placeholder
        if self._survey is not None and name in self._survey.transformed:
            # The model may compute with it: the survey saw that only statements use the result.
            msg["value"] = stand_in(seen_by_model, lead)
            remember_value(msg["value"], seen_by_model.clock)
        # Nothing outside may see a site whose value is no array.
        msg["stop"] = True

    def _stated(self, name: str, owner: str, law: EmissionPath) -> MarginalPath:
        """The marginal law of a statement on a path that the model computes with."""
        assert self.fn is not None
        assert self._survey is not None
        stand_in = self.paths[owner]
        args, kwargs = self._arguments
        rows, view = law.observed_rows, None
        if name in self._survey.transformed[owner]:
            view = view_of(self.fn, args, kwargs, name, owner, self._known)
            view = view.seen_through(stand_in.index)
            rows = np.asarray(view.rows)[rows]
        else:
            shown = times_shown(law.observed_path)
            rows = stand_in.index[rows if shown is None else np.asarray(shown)[rows]]
        statement = Statement(law.emission, None, view, Rows(rows), law.structure, ())
        return stand_in.law_of(statement)

    def _method(self) -> AbstractFilter:
        """The filter; under a `seed` handler on random numbers of the run."""
        if self.method.random_key is None:
            return self.method
        key = numpyro.prng_key()
        return self.method if key is None else self.method.with_key(key)

    def _state(self, msg: Any, law: MarginalPath, mask: Any) -> None:
        """Give an observation the marginal law that all that stands around it asks for."""
        given = msg["value"]
        if given is None:
            given = value_outside(msg["name"], self)
        lead = () if given is None else np.shape(given)[: np.ndim(given) - law.event_dim]
        assert law.stand_in is not None
        plates, shared = plates_around(msg), law.stand_in.plates
        stated = MarginalPath(
            law.path,
            law.method,
            law.statement,
            law.earlier,
            law.lead,
            batch_shape=jnp.broadcast_shapes(msg["fn"].batch_shape, lead),
            power=power_of(msg["scale"], plates, shared),
            data_mask=mask,
            path_mask=law.path_mask,
        )
        stated.stand_in = law.stand_in
        msg["fn"] = stated
        share = math.prod(ratio for name, ratio in plates.items() if name in shared)
        msg["scale"] = None if share == 1.0 else share

    def postprocess_message(self, msg: Any) -> None:
        law = msg.get("fn")
        if msg["type"] in ("sample", "param", "plate") and not isinstance(
            msg["value"], IntegratedPath
        ):
            self._known[msg["name"]] = msg["value"]
        if isinstance(law, dist.Distribution):
            law, _ = peel(law)
        stand_in = law.stand_in if isinstance(law, MarginalPath) else None
        if stand_in is not None and stand_in.owner is self:
            stand_in.note(msg["name"], law, msg["value"])

    def _outer_changes(self) -> list[_ChangePath]:
        """Handlers outside this one that would change the path, had they seen it."""
        return [h for h in reversed(handlers_outside(self)) if isinstance(h, _ChangePath)]


def _as_mask(mask: Any) -> Any:
    """A mask as NumPyro has it: True, or an array."""
    if isinstance(mask, bool | np.bool_):
        return True if mask else np.zeros((), bool)
    return mask


class _ChangePath(Messenger):
    """Replace the law of every path site; a model without one is an error, not a no-op."""

    def __init__(self, fn: Callable[..., Any] | None) -> None:
        self.changed: dict[str, tuple[np.ndarray, Clock]] = {}
        super().__init__(fn)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:
        """The new law, and where the old times stand among the new ones."""
        raise NotImplementedError

    def change(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:
        """Replace the law and note that it was done."""
        new, index = self.replace(name, path)
        self.changed[name] = index, path.clock
        return new, index

    def __enter__(self) -> None:
        self.changed = {}
        super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and not self.changed:
            raise ValueError(
                f"{type(self).__name__} saw no SDEPath site, nor a JumpPath. If the paths are "
                "reparametrised, put it inside: reparam(..(model), config=...)"
            )

    def process_message(self, msg: Any) -> None:
        old = path_law(msg["fn"]) if msg["type"] == "sample" else None
        if old is None:
            return
        name = msg["name"]
        msg["fn"] = _rewrap(msg["fn"], lambda path: self.change(name, path)[0])
        if msg["is_observed"] and msg["fn"].event_shape != old.event_shape:
            raise ValueError(
                f"{type(self).__name__}: path {name!r} is observed directly, so the times "
                "between are latent; make the grid part of the model (TimeGrid) and use "
                "reparam.BridgeReparam"
            )

    def postprocess_message(self, msg: Any) -> None:
        # Handlers outside have kept the whole path by now; the model gets the times it knows.
        name, value = msg.get("name"), msg.get("value")
        if name not in self.changed or msg["type"] not in ("sample", "deterministic"):
            return
        index, clock = self.changed[name]
        if isinstance(value, IntegratedPath):
            msg["value"] = value.view(index)
            return
        axis = value.ndim - 1 - len(clock.state_shape)
        if value.shape[axis] != len(index):
            msg["value"] = times_of_path(value, index, axis)
            remember_value(msg["value"], clock, source=value, index=index)


def _rewrap(fn: Any, change: Callable[[AbstractPathLaw], AbstractPathLaw]) -> Any:
    if isinstance(fn, AbstractPathLaw):
        return change(fn)
    if isinstance(fn, dist.ExpandedDistribution):
        return _rewrap(fn.base_dist, change).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return _rewrap(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
    return _rewrap(fn.base_dist, change).mask(fn._mask)


class discretize(_ChangePath):  # noqa: N801
    """The same model with another transition density: does the posterior depend on it?

    Args:
        fn: the model.
        scheme: one of `nsde.schemes`, for every path site.

    Raises:
        TypeError: a scheme that is none.

    Example:
        >>> import numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     sde = nsde.SDE(lambda t, x: -(x**3), lambda t, x: 0.5)
        ...     numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1], dist.Normal(0.0, 1.0)))
        >>> other = nsde.handlers.discretize(model, nsde.schemes.LocalLinear())
        >>> site = numpyro.handlers.trace(numpyro.handlers.seed(other, 0)).get_trace()["x"]
        >>> type(site["fn"].scheme).__name__
        'LocalLinear'
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, scheme: AbstractScheme | None = None
    ) -> None:
        if not isinstance(scheme, AbstractScheme):
            raise TypeError(f"scheme must be one of nsde.schemes, got {scheme!r}")
        self.scheme = scheme
        super().__init__(fn)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:  # noqa: ARG002
        return path.replace(scheme=self.scheme), np.arange(path.num_times)


class drive(_ChangePath):  # noqa: N801
    """The same model under another driving noise: is the noise of the data Brownian?

    Args:
        fn: the model.
        noise: one of `nsde.noise`, for every path site.

    Raises:
        TypeError: a noise that is none, or a scheme that it cannot drive.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        ...     numpyro.sample("x", nsde.SDEPath(ou, np.arange(5.0), dist.Normal(0.0, 1.0)))
        >>> rough = nsde.handlers.drive(model, nsde.noise.MarkovFBM(0.2))
        >>> site = numpyro.handlers.trace(numpyro.handlers.seed(rough, 0)).get_trace()["x"]
        >>> type(site["fn"].sde.noise).__name__
        'MarkovFBM'
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, noise: AbstractNoise | None = None
    ) -> None:
        if not isinstance(noise, AbstractNoise):
            raise TypeError(f"noise must be one of nsde.noise, got {noise!r}")
        self.noise = noise
        super().__init__(fn)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:  # noqa: ARG002
        return path.replace(sde=path.sde.driven_by(self.noise)), np.arange(path.num_times)


class refine(_ChangePath):  # noqa: N801
    """The same model on a finer grid: does the posterior depend on the step?

    Every path site becomes a path on the refined grid; the model still sees it at its own
    times. The site's value in traces and posterior draws is the fine path.

    Args:
        fn: the model.
        max_step: longest step allowed, in the user's time unit.

    Raises:
        ValueError: a `max_step` that is no positive number; a path on times that are only
            known inside a trace; a path that is observed directly.

    Example:
        >>> import numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 1.0], dist.Normal(0.0, 1.0)))
        ...     return nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1))
        >>> fine = nsde.handlers.refine(model, max_step=0.25)
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(fine, 0)).get_trace()
        >>> sites["x"]["value"].shape, sites["y"]["value"].shape
        ((5,), (2,))
    """

    def __init__(self, fn: Callable[..., Any] | None = None, max_step: float | None = None) -> None:
        if max_step is None or not (np.ndim(max_step) == 0 and 0 < max_step < np.inf):
            raise ValueError(f"max_step must be one positive finite step, got {max_step!r}")
        self.max_step = max_step
        super().__init__(fn)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:
        if isinstance(path.times, jax.core.Tracer):
            raise ValueError(
                f"refine: the times of path {name!r} are traced; hand them to the model as "
                "NumPy arrays, outside jit"
            )
        grid = TimeGrid(np.asarray(path.times), self.max_step)
        return path.replace(times=grid), grid.index


# At the end, because it builds on what stands above.
from numpyro_sde.states.approximate import approximate  # noqa: E402
from numpyro_sde.states.extend import extend  # noqa: E402

__all__ = ["approximate", "collapse", "discretize", "drive", "extend", "marginalize", "refine"]
