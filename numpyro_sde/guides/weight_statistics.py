r"""What drawn paths say of the weights of a drift: the terms of the conjugate update.

Given a path x, its density is a normal likelihood of the weights w of a drift that is linear in
them, with

    Psi(x) = sum_k h_k phi_k phi_k' / D_k,   psi(x) = sum_k phi_k r_k / D_k,

r_k the increment less the drift without weights. Of a path that is not seen, data y say less: by
the identities of Fisher and Louis (1982, "Finding the observed information matrix when using the
EM algorithm"),

    grad log p(y | w) = E g,   -hess log p(y | w) = E Psi(x) - Cov g,   g = psi(x) - Psi(x) w,

both over x given y and w. A law q(x) that is the same for all w, as in SING and gpSDE, leaves out
the covariance, and with it says that the path is known: bands come out too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.collapse import normal_weights, sites_that_use
from numpyro_sde.distributions.collapsed import WeightPrior, path_regression, require_linear
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.guides.conjugate import Layout, Likelihood, Weights, root_of
from numpyro_sde.linear.small import diagonal
from numpyro_sde.models.reading import refuse_weighted, run_aside

ENGINE = "the conjugate update"
OTHERWISE = 'take AutoPathGuide(model, weights="flow")'


class WeightStatistics(NamedTuple):
    """Terms of the conjugate update, from paths drawn at one draw of the parameters.

    Attributes:
        others: one, and the other parameters drawn, unconstrained, less their first values,
            `(1 + p,)`.
        at: weights drawn, `(m,)`.
        slope: mean over the paths of the slope g of their log density in the weights, `(m,)`.
        seen: mean of Psi(x), `(m, m)`.
        lost: covariance of g, `(m, m)`: what is not known of the path.
    """

    others: Float[Array, " 1+p"]
    at: Float[Array, " m"]
    slope: Float[Array, " m"]
    seen: Float[Array, "m m"]
    lost: Float[Array, "m m"]


def weight_statistics(
    law_of: Callable[[Array], SDEPath],
    rest: Float[Array, " p"],
    value: Float[Array, " m"],
    weights: Weights,
    paths: Float[Array, "K *lead T *state"],
    share: float,
) -> WeightStatistics:
    """Statistics of paths, summed over their series.

    Args:
        law_of: the law of the path at values of the sites of the weights.
        rest: the other parameters.
        value: those values.
        weights: their prior.
        paths: draws of the path at these values, two or more.
        share: how many series stand for those of this call: a plate's size over its subsample's.
    """
    unit = jnp.maximum(weights.unit, jnp.finfo(weights.unit.dtype).tiny ** 0.5)
    at = WeightPrior(value, 1.0 / unit, 1)
    residual, design, _ = path_regression(law_of, at, paths)
    slope = jnp.einsum("...n,...nm->...m", residual, design)
    mean = slope.mean(0)
    # Series are independent given the parameters, so their covariances add.
    every = (slope - mean[None]).reshape(-1, slope.shape[-1])
    rows = design.reshape(-1, design.shape[-1])
    count = len(paths)
    return WeightStatistics(
        jnp.append(1.0, rest).astype(mean.dtype),
        value * unit,
        share * mean.reshape(-1, mean.shape[-1]).sum(0),
        (share / count) * (rows.T @ rows),
        (share / (count - 1)) * (every.T @ every),
    )


def paths_of_weights(
    layout: Layout, model: Callable[..., Any], args: Any, kwargs: Any, known: Any, name: str
) -> Callable[[Array], SDEPath]:
    """The law of a path as a function of the values of the weights' sites."""

    def law_of(value: Array) -> SDEPath:
        reader = run_aside(model, args, kwargs, {**known, **layout.split(value)}, {})
        law: SDEPath = reader.paths[name].law
        return law

    return law_of


def check_conjugate(
    weights: Sequence[str], model: Callable[..., Any], args: Any, kwargs: Any, known: Any
) -> None:
    """Refuse a model whose paths are no normal likelihood of the weights.

    Raises:
        ValueError: naming the site and the reason.
    """
    layout = Layout({name: known[name] for name in weights})
    value = layout.joined(known)
    reader = run_aside(model, args, kwargs, known, {})
    for name in weights:
        law, _ = reader.others[name]
        normal_weights({"fn": law, "is_observed": False, "name": name}, ENGINE)
    used = sites_that_use(model, (args, kwargs), known, layout.split, value)
    # Deterministic sites have no density.
    used -= {name for name, site in reader.others.items() if not isinstance(site, tuple)}
    paths = list(reader.paths)
    if len(paths) > 1 or used != set(paths):
        raise ValueError(
            f"{ENGINE} needs weights, {list(weights)}, that are used in the drift of the one path "
            f"and nowhere else; the paths are {paths}, and the weights are used by "
            f"{sorted(used)}: {OTHERWISE}"
        )
    refuse_weighted(reader.paths[paths[0]], paths[0], ENGINE)
    law_of = paths_of_weights(layout, model, args, kwargs, known, paths[0])
    prior = WeightPrior(value, jnp.ones_like(value), 1)
    require_linear(law_of, prior, jnp.zeros(law_of(value).shape()), ENGINE, OTHERWISE)


class Moments(NamedTuple):
    """Running means over draws of the parameters, of which the likelihood is made.

    Attributes:
        Psi: of what paths say of the weights, `(m, m)`.
        tt: of products of t, one and the other parameters, `(1 + p, 1 + p)`.
        tg: of products of t and slopes, `(1 + p, m)`.
        tw: of products of t and weights, `(1 + p, m)`.
        worth: as many even draws would be as exact.
    """

    Psi: Array
    tt: Array
    tg: Array
    tw: Array
    worth: Array


def no_moments(num_weights: int, num_rest: int) -> Moments:
    """Moments of no draws."""
    m, q = num_weights, 1 + num_rest
    shapes = [(m, m), (q, q), (q, m), (q, m), ()]
    return Moments(*(jnp.zeros(shape) for shape in shapes))


def gathered(moments: Moments, found: WeightStatistics, step_size: float) -> Moments:
    """Moments after new draws, leading axis; draws that are not finite are left out.

    The first draws are averaged evenly, until new ones have the share `step_size`.
    """
    each = jax.vmap(lambda *a: jnp.all(jnp.isfinite(jnp.concatenate([jnp.ravel(b) for b in a]))))
    fine = each(*found)
    number = fine.sum().astype(moments.worth.dtype)
    t, at, slope, seen, lost = (
        jnp.where(fine.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0) for a in found
    )
    sums = ((seen - lost).sum(0), t.T @ t, t.T @ slope, t.T @ at)
    share = jnp.maximum(step_size, number / jnp.maximum(moments.worth + number, 1.0))
    share = jnp.where(number > 0, share, 0.0)
    Psi, tt, tg, tw = (
        old + share * (new / jnp.maximum(number, 1.0) - old)
        for old, new in zip(moments, sums, strict=False)
    )
    # The variance of a weighted mean, in units of that of one draw.
    old, new = (1.0 - share) ** 2, share**2
    variance = old / jnp.maximum(moments.worth, 1.0) + new / jnp.maximum(number, 1.0)
    return Moments(Psi, tt, tg, tw, jnp.where(moments.worth + number > 0, 1.0 / variance, 0.0))


def likelihood_of(moments: Moments) -> Likelihood:
    """The normal likelihood whose slope is the drawn slopes', by regression.

    At all draws `g = psi_0 + G rest - Psi w`; with Psi known from the paths the rest is a
    regression on the other parameters.
    """
    Psi = 0.5 * (moments.Psi + moments.Psi.T)
    y = moments.tg + moments.tw @ Psi  # products of t and g + Psi w
    mean, center = y[0], moments.tt[0, 1:]
    S = moments.tt[1:, 1:] - center[:, None] * center[None]
    # As much as the coefficients' own number of draws would hold them to zero.
    ridge = len(center) / jnp.maximum(moments.worth, 1.0)
    S = S + jnp.diag(ridge * diagonal(S) + jnp.finfo(S.dtype).tiny ** 0.5)
    slope = jnp.linalg.solve(S, y[1:] - center[:, None] * mean[None]).T
    return Likelihood(mean - slope @ center, slope, root_of(Psi))
