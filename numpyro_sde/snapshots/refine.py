"""Iterative reference refinement: the reference, of a family, whose bridge needs it least.

The relative entropy of the bridge to its reference is

    V(theta) = min over couplings pi of  sum_ij pi_ij log(pi_ij / (a_i b_j K_ij(theta))).

Shen, Berlinghieri and Broderick (2024), "Multi-marginal Schrödinger bridges with iterative
reference refinement", arXiv:2408.06277, lower it by turns: bridges under the present reference,
then the reference that fits paths of these bridges best. By the envelope theorem the gradient is
`-sum_ij pi_ij d log K_ij`, the mean score of those paths, so both steps together are a descent of V
itself, here by L-BFGS; the points where it rests are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_median

from numpyro_sde.runtime.entry import Held, entry_point
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots import sinkhorn
from numpyro_sde.snapshots.bridge import BridgeResult, bridge_of, reference_law
from numpyro_sde.snapshots.cells import Cells, as_cells, as_snapshots
from numpyro_sde.snapshots.clock import Clock
from numpyro_sde.snapshots.identifiability import warn_if_stationary
from numpyro_sde.snapshots.kernels import Reference, gap_grids
from numpyro_sde.snapshots.law import SnapshotLaw
from numpyro_sde.statespace.checks import check_count, typed_key

_BEYOND = 1e10  # in the place of an objective that is not finite
_WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


@dataclass(frozen=True)
class RefinedReference:
    """A reference refined by its own bridges: a point estimate, what `refine_reference` returns.

    The objective is a relative entropy of couplings, not a log likelihood: intervals made of its
    curvature are two to three times too short. `bootstrap` shows how the estimate varies with the
    cells; for a posterior use `SnapshotLaw` in the same model.

    Attributes:
        values: the estimate, by site.
        sde: the reference at the estimate.
        bridge: its bridge.
        objective: the objective after each iteration, falling.
        converged: whether the search ended by itself.
        bootstrap: estimates from resampled cells, by site, leading axis `num_bootstrap`; empty
            without.

    Example:
        >>> import numpyro_sde as nsde
        >>> "likelihood" in nsde.snapshots.RefinedReference.__doc__
        True
    """

    values: dict[str, Array]
    sde: SDE
    bridge: BridgeResult
    objective: Float[np.ndarray, " I"]
    converged: bool
    bootstrap: dict[str, np.ndarray]

    def interval(self, prob: float = 0.9) -> dict[str, np.ndarray]:
        """Percentile intervals over the bootstrap, `(2, *shape)` for each site.

        Args:
            prob: probability that they hold.

        Raises:
            ValueError: no bootstrap.
        """
        if not self.bootstrap:
            raise ValueError("there is no bootstrap: call refine_reference(..., num_bootstrap=100)")
        tails = (1.0 - prob) / 2.0
        return {k: np.quantile(v, [tails, 1.0 - tails], axis=0) for k, v in self.bootstrap.items()}

    def __repr__(self) -> str:
        means = ", ".join(f"{k}={np.asarray(v).round(4).tolist()}" for k, v in self.values.items())
        spread = f"{len(next(iter(self.bootstrap.values())))} resamples" if self.bootstrap else "no"
        return f"RefinedReference({means}; point estimate, not a posterior; bootstrap: {spread})"


def refine_reference(
    model: Callable[..., Any],
    snapshots: Any,
    *args: Any,
    rng_key: PRNGKeyArray | None = None,
    init_values: Mapping[str, ArrayLike] | None = None,
    rounds: int = 100,
    num_bootstrap: int = 0,
    tol: float = 1e-6,
    **kwargs: Any,
) -> RefinedReference:
    """Find the parameters of a family of SDEs whose Schrödinger bridge departs least from it.

    The family is a NumPyro model with one `SnapshotLaw` site, called as `model(snapshots, *args,
    **kwargs)`; its latent sites are the parameters, priors serve as starting points (their medians)
    and for constraints only. The drift is refined; the diffusion stays what it is: bridges under a
    wrong diffusion do not tell it (in the published method as well).

    Args:
        model: the model.
        snapshots: cells `(K, n, d)` or `(K, n)`, NaN where there is none; or a list of clouds.
        args: further arguments of the model.
        rng_key: random key of the bootstrap; None for `jax.random.key(0)`.
        init_values: starting points, by site.
        rounds: most iterations of the search.
        num_bootstrap: resamples of the cells, each refined anew from the estimate.
        tol: of Sinkhorn's iteration.
        kwargs: keyword arguments of the model.

    Returns:
        The estimate, its bridge and the bootstrap: no posterior.

    Raises:
        ValueError: a model without one `SnapshotLaw`, a batch of them, discrete latent sites, no
            latent site, a diffusion that depends on one.

    Warns:
        UserWarning: snapshots that look stationary.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def family(snapshots):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        ...     sde = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=mean, scale=1.0)
        ...     law = nsde.SnapshotLaw(sde, [0.0, 1.0], snapshots[0])
        ...     numpyro.sample("cells", law, obs=snapshots)
        >>> rng = np.random.default_rng(0)
        >>> start = rng.normal(0.0, 1.0, 200)
        >>> end = np.exp(-1.0) * rng.normal(0.0, 1.0, 200) + 2 * (1 - np.exp(-1.0))
        >>> end = end + np.sqrt((1 - np.exp(-2.0)) / 2) * rng.normal(0.0, 1.0, 200)
        >>> fit = nsde.refine_reference(family, np.stack([start, end]))
        >>> bool(abs(fit.values["mean"] - 2.0) < 0.4)
        True
    """
    check_count("rounds", rounds)
    check_count("num_bootstrap", num_bootstrap, least=0)
    data = as_snapshots(snapshots)
    family = _Family.of(model, data, args, kwargs, dict(init_values or {}))
    cells = as_cells(data, family.clock.times)
    warn_if_stationary(cells)
    place, history, converged = _descend(family, cells, family.start, tol, rounds)
    estimates: dict[str, list[np.ndarray]] = {name: [] for name in family.start}
    key = typed_key(jax.random.key(0) if rng_key is None else rng_key)
    for one in jax.random.split(key, num_bootstrap) if num_bootstrap else ():
        weights = _resampled(one, np.asarray(cells.weights))
        again = as_cells(data, family.clock.times, weights)
        found, _, _ = _descend(family, again, place, tol, rounds)
        for name, value in family.constrained(found).items():
            estimates[name].append(np.asarray(value))
    sde, chosen, rate = family.equation(place)
    law = reference_law(sde, chosen, rate, scalar=cells.scalar)
    return RefinedReference(
        values=family.constrained(place),
        sde=sde,
        bridge=bridge_of(law, cells, family.clock, tol=tol, max_iterations=100_000),
        objective=np.asarray(history),
        converged=converged,
        bootstrap={k: np.stack(v) for k, v in estimates.items() if v},
    )


@dataclass(frozen=True)
class _Family:
    """A model as a map from unconstrained numbers to references."""

    model: Callable[..., Any]
    data: Array
    further: Held
    site: str
    clock: Clock
    start: dict[str, Array]
    supports: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        data: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        init_values: dict[str, Any],
    ) -> _Family:
        # An array of JAX is data of the program; one of NumPy would be part of it.
        snapshots = jnp.asarray(data, jnp.result_type(float))
        first = handlers.substitute(
            handlers.seed(model, jax.random.key(0)), substitute_fn=init_to_median(num_samples=50)
        )
        sites = handlers.trace(handlers.substitute(first, init_values)).get_trace(
            snapshots, *args, **kwargs
        )
        name, law = _snapshot_site(sites)
        latent = {k: s for k, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        if unknown := sorted(set(init_values) - set(latent)):
            raise ValueError(
                f"init_values names {unknown}, and the latent sites are {list(latent)}"
            )
        if not latent:
            raise ValueError("refine_reference: the model has no latent site to refine")
        for k, s in latent.items():
            if s["fn"].is_discrete:
                raise ValueError(f"refine_reference: site {k!r} is discrete")
        supports = {k: s["fn"].support for k, s in latent.items()}
        start = {
            k: jnp.asarray(biject_to(supports[k]).inv(s["value"]), jnp.result_type(float))
            for k, s in latent.items()
        }
        # What else the model takes is part of the program: numbers stay numbers.
        further = Held((args, kwargs))
        family = cls(model, snapshots, further, name, law.clock, start, supports)
        family.refuse_diffusion(np.asarray(data))
        return family

    def constrained(self, place: Mapping[str, Array]) -> dict[str, Array]:
        """Values of the latent sites."""
        return {k: biject_to(self.supports[k])(v) for k, v in place.items()}

    def equation(self, place: Mapping[str, Array]) -> tuple[SDE, Any, Any]:
        """The equation, its transition and its growth rate."""
        return _equation(self.model, self.data, self.further, self.site, self.constrained(place))

    def refuse_diffusion(self, data: np.ndarray) -> None:
        """Raise a `ValueError` where the diffusion depends on a latent site."""
        cells = data.reshape(data.shape[0], data.shape[1], -1)
        present = cells[0][~np.isnan(cells[0]).any(-1)][:8]
        states = jnp.asarray(present[:, 0] if data.ndim == 2 else present)

        def columns(place: dict[str, Array]) -> Array:
            sde = self.equation(place)[0]
            t = float(self.clock.times[0])
            return jax.vmap(lambda x: sde.diffusion_columns_at(t, x))(states)

        slopes = jax.jit(jax.jacfwd(columns))(self.start)
        names = sorted(k for k, v in slopes.items() if bool(jnp.any(v != 0)))
        if names:
            raise ValueError(
                f"refine_reference: the diffusion depends on {names}. Bridges do not tell a "
                "diffusion: hold it (numpyro.handlers.condition), or fit the model by its "
                "likelihood (MCMC(NUTS(model)) with the same SnapshotLaw)"
            )


def _snapshot_site(sites: Mapping[str, Any]) -> tuple[str, SnapshotLaw]:
    found = {}
    for name, site in sites.items():
        law = site.get("fn")
        while isinstance(law, _WRAPPERS):
            law = law.base_dist
        if site["type"] == "sample" and isinstance(law, SnapshotLaw):
            found[name] = (site, law)
    if len(found) != 1:
        raise ValueError(
            f"refine_reference: the model must have one SnapshotLaw site, got {list(found)}"
        )
    name, (site, law) = next(iter(found.items()))
    if site["fn"].batch_shape:
        raise ValueError(
            f"refine_reference: site {name!r} has batch shape {site['fn'].batch_shape}: refine one "
            "population at a time"
        )
    return name, law


def _equation(
    model: Callable[..., Any],
    data: Array,
    further: Held,
    site: str,
    values: Mapping[str, Array],
) -> tuple[SDE, Any, Any]:
    args, kwargs = further.value
    held = handlers.substitute(handlers.seed(model, jax.random.key(0)), dict(values))
    law = handlers.trace(held).get_trace(data, *args, **kwargs)[site]["fn"]
    while isinstance(law, _WRAPPERS):
        law = law.base_dist
    return cast("tuple[SDE, Any, Any]", law.equation)


def _descend(
    family: _Family, cells: Cells, place: Mapping[str, Array], tol: float, rounds: int
) -> tuple[dict[str, Array], list[float], bool]:
    """Minimise the objective from a point; the objective after each iteration."""
    from scipy.optimize import minimize

    flat, unravel = jax.flatten_util.ravel_pytree(dict(place))
    tol = max(tol, 4.0 * float(jnp.finfo(cells.values.dtype).eps))
    history: list[float] = []
    transforms = {k: biject_to(v) for k, v in family.supports.items()}

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        here = unravel(jnp.asarray(z, flat.dtype))
        value, slope = _objective(
            family.model,
            family.data,
            family.further,
            (family.site, cells.scalar),
            family.clock,
            transforms,
            here,
            (cells.values, cells.weights, jnp.asarray(tol, flat.dtype)),
        )
        gradient = np.asarray(jax.flatten_util.ravel_pytree(slope)[0], np.float64)
        if not np.isfinite(float(value)) or not np.all(np.isfinite(gradient)):
            return _BEYOND, np.zeros_like(gradient)  # the line search steps back
        return float(value), gradient

    value, _ = objective(np.asarray(flat, np.float64))
    if value == _BEYOND:
        raise ValueError(
            "refine_reference: the objective is not finite at the start: give init_values from "
            "which the reference reaches the snapshots"
        )
    history.append(value)
    options = {"maxiter": rounds, "maxcor": 10}
    found = minimize(
        objective,
        np.asarray(flat, np.float64),
        jac=True,
        method="L-BFGS-B",
        callback=lambda intermediate_result: history.append(float(intermediate_result.fun)),
        options=options,
    )
    # Rounding of the objective in float32 ends a line search at the minimum.
    converged = bool(found.success) or "ABNORMAL" in str(found.message)
    return unravel(jnp.asarray(found.x, flat.dtype)), history, converged


@entry_point
def _objective(
    model: Callable[..., Any],
    data: Array,
    further: Held,
    names: tuple[str, bool],
    clock: Clock,
    transforms: Mapping[str, Any],
    place: dict[str, Array],
    cells: tuple[Array, Array, Array],
) -> tuple[Array, dict[str, Array]]:
    """The objective and its gradient."""
    site, scalar = names
    values, weights, tol = cells

    def objective(place: dict[str, Array]) -> Array:
        here = {k: transforms[k](v) for k, v in place.items()}
        sde, chosen, rate = _equation(model, data, further, site, here)
        law = reference_law(sde, chosen, rate, scalar=scalar)
        grids = jnp.asarray(gap_grids(clock, law.exact), values.dtype)
        gaps = (grids, values[:-1], values[1:], weights[:-1], weights[1:])
        return jnp.sum(lax.map(jax.checkpoint(lambda gap: _gap_value(law, gap, tol)), gaps))

    return jax.value_and_grad(objective)(place)


def _gap_value(law: Reference, gap: Any, tol: Array) -> Array:
    """The objective of one gap, with the gradient that the envelope theorem gives it."""
    grid, x, y, a, b = gap
    kernel, log_mass = law.log_kernel(grid, x, y)
    mass = jnp.where(a > 0, lax.stop_gradient(log_mass), -jnp.inf)
    rows = a * jnp.exp(mass - jnp.max(mass))
    rows = rows / jnp.sum(rows)
    held = lax.stop_gradient(kernel)
    found = sinkhorn.solve(held, rows, b, tol=tol, max_iterations=100_000)
    pi = sinkhorn.coupling(held, rows, b, found.f, found.g)
    value = jnp.sum(rows * found.f) + jnp.sum(b * found.g)
    return lax.stop_gradient(value) - jnp.sum(pi * (kernel - held))


def _resampled(key: PRNGKeyArray, weights: np.ndarray) -> np.ndarray:
    """Cells drawn with replacement, as counts."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (2,), "uint32")).tolist())
    counts = [rng.multinomial(int((w > 0).sum()), w / w.sum()) for w in weights.astype(np.float64)]
    return np.stack(counts).astype(float)
