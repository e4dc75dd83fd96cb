"""Integrate the Gaussian weights of an unknown drift out of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_sde.distributions.collapsed import (
    CollapsedPath,
    WeightPrior,
    WeightsOf,
    draw_weights,
    is_gaussian,
    require_linear,
    steps,
)
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.step_check import warn_coarse_step
from numpyro_sde.fields.field import LinearField, recorded_fields
from numpyro_sde.models.reading import parameters, run_aside
from numpyro_sde.models.stack import outside_all_handlers, path_law, peel, power_of
from numpyro_sde.schemes.dependence import reachable


class _Stop(Exception):  # noqa: N818
    """A run that has come to the site it was made for."""


class _Until(Messenger):
    """Run a model up to a site, and keep its law, or the value of a deterministic one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("sample", "deterministic") and msg["name"] == self.name:
            self.law = msg["fn"] if msg["type"] == "sample" else msg["value"]
            raise _Stop


class collapse(Messenger):  # noqa: N801
    """Integrate the weights of an unknown drift out of a model, exactly.

    Where a path is Gaussian step by step and its mean is linear in normal weights (a field of
    `nsde.fields` in the drift under `Euler()`), the weights have a normal law given the path, and
    the path's density without them is known in closed form. NUTS is then left with the
    hyperparameters: no funnel between amplitude and weights, a handful of unknowns. `nsde.smooth`
    draws the weights back.

    The path may be observed (`obs=`), or latent and sampled as it is.

    Args:
        fn: the model.
        name: the field's name, as given to `register` (its site `{name}/z` is integrated out), or
            the name of a site with a normal law.

    Raises:
        ValueError: when the model runs: no such site, a law that is not normal, a step that is
            not linear in the weights, weights that are used elsewhere than in the drift of one
            path, a path in a mask, a scale or a subsample.

    When not to use it: `LocalLinear()`, noise that depends on the field, networks that are not
    linear in their weights: there leave the weights to NUTS.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> prior = nsde.fields.HSGP(dim=1, box=2.5, num=8)
        >>> times, x = np.arange(5) * 0.1, np.array([0.0, 0.2, 0.1, 0.3, 0.2])
        >>> def model():
        ...     f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.8)
        ...     sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 1.0, params=f)
        ...     numpyro.sample("x", nsde.SDEPath(sde, times, init=x[0]), obs=x)
        >>> collapsed = nsde.handlers.collapse(model, "f")
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(collapsed, 0)).get_trace()
        >>> sorted(sites)
        ['f/amplitude', 'x']
        >>> draws = {"f/amplitude": np.array([1.0, 2.0])}
        >>> nsde.smooth(collapsed, draws, rng_key=jax.random.key(0))["f/z"].shape
        (2, 8)
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        if not callable(fn):
            raise TypeError(f"collapse takes a model, got {type(fn).__name__}")
        super().__init__(fn)
        self.name = name
        self.call: tuple[Any, Any] = ((), {})
        self._begin()

    def _begin(self) -> None:
        self.values: dict[str, Any] = {}
        self.site: str | None = None
        self.prior: WeightPrior | None = None
        self.path: str | None = None
        self.users: set[str] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        self.call = args, kwargs
        result = super().__call__(*args, **kwargs)
        if self.site is None:
            raise ValueError(
                f"collapse found no site {self.name + '/z'!r} nor {self.name!r} in the model"
            )
        if self.path is None:
            raise ValueError(f"collapse found no path whose drift uses {self.site!r}")
        return result

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("sample", "deterministic"):
            return
        if msg["type"] == "sample" and msg["name"] in (f"{self.name}/z", self.name):
            self.site, self.prior = msg["name"], normal_weights(msg)
            # Known inside, and not seen outside.
            msg["value"], msg["stop"] = self.prior.loc, True
        elif self.prior is not None and msg["name"] in self._users():
            self._take(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("sample", "param") and msg["name"] != self.site:
            self.values[msg["name"]] = msg["value"]

    def _users(self) -> set[str]:
        """Names of the sites that use the weights, by one trace of the model."""
        if self.users is None:
            assert self.prior is not None
            assert self.site is not None
            site = self.site
            self.users = sites_that_use(
                self.fn, self.call, self.values, lambda z: {site: z}, self.prior.loc
            )
        return self.users

    def _take(self, msg: dict[str, Any]) -> None:
        """Put the collapsed law in the place of a path's."""
        name, prior = msg["name"], self.prior
        assert prior is not None
        law = None if msg["type"] == "deterministic" else path_law(msg["fn"])
        if not isinstance(law, SDEPath) or self.path is not None:
            where = f"the drift of {self.path!r} and " if self.path else ""
            raise ValueError(
                f"collapse integrates weights out of the drift of one path, but {self.site!r} is "
                f"used by {where}site {name!r}: leave the weights to NUTS, or take that site out"
            )
        _, mask = peel(msg["fn"])
        if mask is not True or power_of(msg["scale"], {}, ()) is not None:
            raise ValueError(
                f"collapse needs path {name!r} whole: without mask, scale or subsample"
            )
        self.path = name
        traced = self._traced(name, law)
        require_linear(traced.law, prior, jnp.zeros(law.shape()))
        msg["fn"] = CollapsedPath(traced.law, prior, traced.law_and_weights)

    def _traced(self, name: str, law: SDEPath) -> _LawOfWeights:
        """The law of a path as a function of the weights, all else as in this run."""
        values, (args, kwargs), site, fn = dict(self.values), self.call, self.site, self.fn
        found: dict[str, Any] = {}

        def leaves_of(z: Array) -> tuple[list[Any], list[Any]]:
            until = _Until(name)
            known = substitute(data=values | {str(site): z})
            with (
                recorded_fields() as fields,
                outside_all_handlers(),
                until,
                seed(rng_seed=0),
                known,
                suppress(_Stop),
            ):
                fn(*args, **kwargs)
            leaves, treedef = jax.tree_util.tree_flatten(path_law(until.law))
            field = fields.get(self.name)
            found["elementwise"] = isinstance(field, LinearField) and field.basis.elementwise
            found["arrays"] = [i for i, a in enumerate(leaves) if isinstance(a, jax.Array)]
            found["weights"] = [
                i
                for i, a in enumerate(leaves)
                if isinstance(field, LinearField) and a is field.weights
            ]
            return [leaves[i] for i in found["arrays"]], _closed_over(treedef, leaves)

        assert self.prior is not None
        closed = jax.make_jaxpr(leaves_of)(self.prior.loc)
        used = reachable(closed.jaxpr, closed.jaxpr.invars)
        arrays = found["arrays"]
        if any(used[len(arrays) :]):
            raise ValueError(
                f"the drift of path {name!r} closes over what is made of {self.site!r}: hand it "
                "over in params"
            )
        varying = [(i, place) for i, place in enumerate(arrays) if used[i]]
        place = found["weights"][0] if len(found["weights"]) == 1 else None
        return _LawOfWeights(law, closed, varying, place, found["elementwise"])


class _LawOfWeights(NamedTuple):
    """The law of a path as a function of the weights: a trace of the model, played again.

    Attributes:
        here: the law at the weights' means.
        closed: the trace, from weights to arrays of the law.
        varying: which of its outputs change with the weights, and their places among the law's
            leaves.
        place: the place of a field's weights among them; None where it has none.
        elementwise: whether each of those is a multiple of its own whitened weight.
    """

    here: SDEPath
    closed: Any
    varying: list[tuple[int, int]]
    place: int | None
    elementwise: bool

    def law(self, z: Array) -> SDEPath:
        """The law at given weights."""
        law: SDEPath = jax.tree_util.tree_unflatten(*self._flat(z))
        return law

    @property
    def law_and_weights(self) -> WeightsOf | None:
        """The same with its field's weights; None where it is not a field linear in them."""
        place = self.place
        if place is None:
            return None

        def law_and_weights(z: Array) -> tuple[SDEPath, Array]:
            treedef, leaves = self._flat(z)
            return jax.tree_util.tree_unflatten(treedef, leaves), leaves[place]

        return WeightsOf(law_and_weights, self.elementwise)

    def _flat(self, z: Array) -> tuple[Any, list[Any]]:
        leaves, treedef = jax.tree_util.tree_flatten(self.here)
        outputs = jaxpr_as_fun(self.closed)(z)
        for i, place in self.varying:
            leaves[place] = outputs[i]
        return treedef, leaves


def _closed_over(treedef: Any, leaves: list[Any]) -> list[Any]:
    """What the steps of a law use that is not among its arrays."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def moments(arrays: list[Array]) -> Any:
        own = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            own[i] = array
        law = jax.tree_util.tree_unflatten(treedef, own)
        return steps(law, jnp.zeros(law.shape())) if is_gaussian(law) else ()

    inner = jax.make_jaxpr(moments)([leaves[i] for i in places])
    return [a for a in inner.consts if isinstance(a, jax.core.Tracer)]


def sites_that_use(
    fn: Callable[..., Any],
    call: tuple[Any, Any],
    values: Any,
    weights: Callable[[Array], Mapping[str, Array]],
    at: Array,
) -> set[str]:
    """Names of the sites whose law or value is made of weights, by one trace of the model.

    Args:
        fn: the model.
        call: its arguments.
        values: of other sites.
        weights: sites of the weights from an array of them.
        at: that array.
    """
    names: list[str] = []

    def outputs(z: Array) -> list[Any]:
        own = weights(z)
        reader = run_aside(fn, *call, {**values, **own}, {}, marked=True)
        trees: dict[str, Any] = {name: path.law for name, path in reader.paths.items()}
        trees |= {
            name: (seen.law.observed_path, parameters(seen))
            for name, seen in reader.observations.items()
        }
        trees |= {
            name: other[0] if isinstance(other, tuple) else other
            for name, other in reader.others.items()
            if name not in own
        }
        found: list[Any] = []
        for name, tree in trees.items():
            arrays = [a for a in jax.tree_util.tree_leaves(tree) if isinstance(a, jax.Array)]
            names.extend([name] * len(arrays))
            found.extend(arrays)
        return found

    jaxpr = jax.make_jaxpr(outputs)(at).jaxpr
    used = reachable(jaxpr, jaxpr.invars)
    return {name for name, one in zip(names, used, strict=True) if one}


def normal_weights(msg: Mapping[str, Any], engine: str = "collapse") -> WeightPrior:
    """Means and standard deviations of a site of independent normal weights."""
    law, event_dim = msg["fn"], msg["fn"].event_dim
    core = law
    while isinstance(core, dist.Independent | dist.ExpandedDistribution):
        core = core.base_dist
    if msg["is_observed"] or not isinstance(core, dist.Normal):
        raise ValueError(
            f"{engine} needs latent weights with independent normal priors; site "
            f"{msg['name']!r} is "
            f"{'observed' if msg['is_observed'] else type(core).__name__}"
        )
    real = jnp.result_type(float)
    loc, scale = (
        jnp.broadcast_to(jnp.asarray(a, real), law.shape()) for a in (core.loc, core.scale)
    )
    return WeightPrior(loc, scale, event_dim)


def smooth_weights(
    model: collapse,
    samples: Mapping[str, Any],
    args: Any,
    kwargs: Any,
    rng_key: PRNGKeyArray,
    batch_size: int,
) -> dict[str, Array]:
    """Draws of the weights that `collapse` integrated out, one for each draw of the rest."""
    kept = {name: jnp.asarray(value) for name, value in samples.items()}
    count = {name: value.shape[0] for name, value in kept.items()}
    if len(set(count.values())) != 1:
        raise ValueError(f"samples must have one leading axis of draws, got lengths {count}")
    keys = jax.random.split(rng_key, next(iter(count.values())))
    names: list[str] = []

    def one(inputs: tuple[dict[str, Array], PRNGKeyArray]) -> Array:
        draw, key = inputs
        model_key, own_key = jax.random.split(key)
        run = trace(substitute(seed(model, model_key), data=draw))
        recorded = run.get_trace(*args, **kwargs)
        assert model.path is not None
        assert model.site is not None
        names[:] = [model.site]
        site = recorded[model.path]
        law = site["fn"]
        return draw_weights(law.weights_given(site["value"]), law.prior, own_key)

    draws = jax.lax.map(one, (kept, keys), batch_size=batch_size)
    if not isinstance(draws, jax.core.Tracer):
        first = {name: value[-1] for name, value in {**kept, names[0]: draws}.items()}
        _warn_coarse(model, first, args, kwargs)
    return {names[0]: draws}


def _warn_coarse(model: collapse, draw: Mapping[str, Array], args: Any, kwargs: Any) -> None:
    """Say where Euler's steps are too long for the drift at a draw."""
    run = trace(substitute(seed(model.fn, 0), data=dict(draw)))
    site = run.get_trace(*args, **kwargs)[str(model.path)]
    law = path_law(site["fn"])
    if law is not None and not isinstance(site["value"], jax.core.Tracer):
        warn_coarse_step(law, site["value"])
