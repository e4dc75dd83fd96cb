"""Integrate the Gaussian weights of an unknown drift out of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_sde.distributions.collapsed import (
    CollapsedPath,
    WeightPrior,
    draw_weights,
    require_linear,
)
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.fields.field import LinearField, recorded_fields
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
            self.site, self.prior = msg["name"], _normal_weights(msg)
            # Known inside, and not seen outside.
            msg["value"], msg["stop"] = self.prior.loc, True
        elif self.prior is not None and self._uses_weights(msg):
            self._take(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("sample", "param") and msg["name"] != self.site:
            self.values[msg["name"]] = msg["value"]

    def _law_at(self, name: str) -> Callable[[Array], Any]:
        """The law of a site as a function of the weights, all else as in this run."""
        values, (args, kwargs), site, fn = dict(self.values), self.call, self.site, self.fn

        def law(z: Array) -> Any:
            until = _Until(name)
            known = substitute(data=values | {str(site): z})
            with outside_all_handlers(), until, seed(rng_seed=0), known:
                try:
                    fn(*args, **kwargs)
                except _Stop:
                    return until.law
            # A site that a handler outside makes, such as the Jacobian of a prior's transform.
            return ()

        return law

    def _uses_weights(self, msg: dict[str, Any]) -> bool:
        assert self.prior is not None
        law = self._law_at(msg["name"])
        closed = jax.make_jaxpr(
            lambda z: [a for a in jax.tree_util.tree_leaves(law(z)) if isinstance(a, jax.Array)]
        )(self.prior.loc)
        return any(reachable(closed.jaxpr, closed.jaxpr.invars))

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
        at = self._law_at(name)

        def law_of(z: Array) -> SDEPath:
            found = path_law(at(z))
            assert found is not None
            return found

        self.path = name
        require_linear(law_of, prior, jnp.zeros(law.shape()))
        name_of_field = self.name

        def weights_of(z: Array) -> tuple[SDEPath, Array]:
            with recorded_fields() as fields:
                law = law_of(z)
            field = fields[name_of_field]
            assert isinstance(field, LinearField)
            return law, field.weights

        with recorded_fields() as fields:
            at(prior.loc)
        linear = isinstance(fields.get(self.name), LinearField)
        msg["fn"] = CollapsedPath(law_of, prior, weights_of if linear else None)


def _normal_weights(msg: dict[str, Any]) -> WeightPrior:
    """Means and standard deviations of a site of independent normal weights."""
    law, event_dim = msg["fn"], msg["fn"].event_dim
    core = law
    while isinstance(core, dist.Independent | dist.ExpandedDistribution):
        core = core.base_dist
    if msg["is_observed"] or not isinstance(core, dist.Normal):
        raise ValueError(
            f"collapse needs latent weights with independent normal priors; site "
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
    return {names[0]: draws}
