"""Do the conclusions hang on choices: grid, scheme, noise, prior?

Each change is a refit by the same engine, set beside the fit. How strongly prior and data speak is
asked of the draws themselves, by powers of either (Kallioinen, Paananen, Buerkner and Vehtari 2024,
Statistics and Computing 34, 57).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from scipy.special import logsumexp

from numpyro_sde import handlers
from numpyro_sde.checking.fitting import CheckedFit
from numpyro_sde.checking.fitting import fit as fit_model
from numpyro_sde.checking.steps import Budget, Level, Step, stopwatch
from numpyro_sde.diagnostics.compare.arviz_compat import get_group, smooth_log_weights
from numpyro_sde.diagnostics.compare.draws import Draws, evaluate_model
from numpyro_sde.diagnostics.compare.fits_compared import compare_fits
from numpyro_sde.diagnostics.compare.plots import plot_fits
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.noise import Brownian, MarkovFBM
from numpyro_sde.schemes import Euler, LocalLinear, Milstein
from numpyro_sde.sde import SDE

_HURST = 0.4  # of the other noise: a little rougher than Brownian
_SMALL, _LARGE = 0.25, 0.5  # posterior sds
_ERRORS = 4.0
_POWERS = {"half as strong": 0.5, "twice as strong": 2.0}
_KHAT = 0.7


class Change(NamedTuple):
    """One way to state the model otherwise.

    Attributes:
        name: What is changed.
        model: The changed model; None where nothing is to be changed.
        why: Why nothing is, or what the change is.
        grave: Whether an answer that moves is a failure, rather than a fact to know.
    """

    name: str
    model: Callable[..., Any] | None
    why: str
    grave: bool


def changes(fit: CheckedFit) -> list[Change]:
    """What can be varied in a model: a grid half as long in step, another scheme, rougher noise.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.checking.refits import changes
        >>> def model(y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> found = nsde.checking.fit(model, np.array([0.1, 0.3, 0.2, 0.4]), progress=False)
        >>> [(change.name, change.model is None) for change in changes(found)]
        [('grid', True), ('scheme', True), ('noise', False)]
    """
    laws = list(fit.sites.laws.values())
    found = [
        _finer_grid(fit, laws),
        _other_scheme(fit, laws),
        _rougher_noise(fit, laws),
    ]
    return found if laws else []


def _finer_grid(fit: CheckedFit, laws: list[AbstractPathLaw]) -> Change:
    if _all_exact(laws):
        return Change("grid", None, "the transition is exact, whatever the step", True)
    if any(name in fit.sites.data for name in fit.sites.laws):
        return Change("grid", None, "a path is observed directly on its grid", True)
    steps = [float(np.max(np.asarray(law.dt))) for law in laws if not _exact(law)]
    half = max(steps) / 2.0
    return Change(
        "grid", handlers.refine(fit.model, max_step=half), f"steps up to {half:.3g}", True
    )


def _other_scheme(fit: CheckedFit, laws: list[AbstractPathLaw]) -> Change:
    if _all_exact(laws):
        return Change("scheme", None, "the transition is exact", True)
    used = {type(law.scheme) for law in laws}
    for scheme in (Milstein(), LocalLinear(), Euler()):
        if type(scheme) not in used and all(_takes(scheme, law) for law in laws):
            model = handlers.discretize(fit.model, scheme)
            return Change("scheme", model, type(scheme).__name__, True)
    return Change("scheme", None, "no other scheme takes the equation", True)


def _takes(scheme: Any, law: AbstractPathLaw) -> bool:
    if not isinstance(law.sde, SDE):
        return False
    try:
        scheme.check(law.sde, law.state_shape)
        law.sde.check_scheme(scheme)
    except (TypeError, ValueError):
        return False
    return not (isinstance(scheme, Milstein) and law.state_shape)


def _rougher_noise(fit: CheckedFit, laws: list[AbstractPathLaw]) -> Change:
    plain = all(isinstance(law.sde, SDE) and isinstance(law.sde.noise, Brownian) for law in laws)
    if not plain:
        return Change("noise", None, "the noise is no Brownian motion", False)
    if any(name in fit.sites.data for name in fit.sites.laws):
        return Change("noise", None, "no memory in the noise of a path observed directly", False)
    rough = handlers.drive(fit.model, MarkovFBM(_HURST))
    # An exact step knows Brownian noise alone.
    return Change("noise", rough, f"fractional noise of Hurst index {_HURST}", False)


def _exact(law: AbstractPathLaw) -> bool:
    if law.whole_states or not isinstance(law.sde, SDE):
        return True
    transition = law.sde.exact_transition()
    return transition is not None and type(law.scheme) is type(transition)


def _all_exact(laws: list[AbstractPathLaw]) -> bool:
    return all(_exact(law) for law in laws)


def sensitivity(
    fit: CheckedFit,
    only: str | None = None,
    *,
    time_budget: float = 180.0,
    rng_key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> list[Step]:
    """Refit with a finer grid, another scheme and rougher noise, and say what moves.

    A posterior that moves with grid or scheme by half a standard deviation is one of the
    discretisation: take smaller steps. One that moves with the roughness of the noise hangs on
    Brownian noise, which is for you to defend.

    Args:
        fit: From `nsde.checking.fit`.
        only: One of "grid", "scheme", "noise"; None does all.
        time_budget: Seconds; a refit begins only if it is likely to end in time.
        rng_key: None is `jax.random.key(4)`.
        progress: Say on standard error what is done.

    Returns:
        A verdict on each.

    Raises:
        ValueError: An unknown name.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     walk = nsde.processes.BrownianMotion(0.0, scale)
        ...     numpyro.sample("y", nsde.SDEPath(walk, np.arange(20.0), init=0.0), obs=y)
        >>> found = nsde.checking.fit(model, np.cumsum(np.ones(20)) - 1.0, progress=False)
        >>> nsde.checking.sensitivity(found, "grid", progress=False)
        [[not done] sensitivity to grid: the transition is exact, whatever the step]
    """
    possible = changes(fit)
    if only is not None:
        if only not in ("grid", "scheme", "noise"):
            raise ValueError(f"only must be 'grid', 'scheme' or 'noise', got {only!r}")
        possible = [change for change in possible if change.name == only]
    budget = Budget(time_budget)
    key = jax.random.key(4) if rng_key is None else rng_key
    return [
        _refit(fit, change, budget, jax.random.fold_in(key, index), progress)
        for index, change in enumerate(possible)
    ]


def _refit(
    fit: CheckedFit, change: Change, budget: Budget, key: PRNGKeyArray, progress: bool
) -> Step:
    name = f"sensitivity to {change.name}"
    if change.model is None:
        return Step(name, "not done", change.why)
    likely = 1.5 * fit.seconds
    if budget.left < likely:
        return Step(
            name,
            "not done",
            f"it takes some {likely:.0f} s, {max(budget.left, 0.0):.0f} s are left",
        )
    with stopwatch() as seconds:
        try:
            other = fit_model(
                change.model,
                *fit.args,
                engine=fit.engine,
                treat=fit.treat,
                num_chains=2,
                time_budget=max(budget.left, 1.0),
                rng_key=key,
                model_kwargs=fit.kwargs,
                progress=progress,
            )
        except (TypeError, ValueError, TimeoutError) as error:
            return Step(name, "not done", f"{change.why}: {str(error).splitlines()[0]}")
        took = seconds()
    return _compared(name, fit, other, change, took)


def _compared(name: str, fit: CheckedFit, other: CheckedFit, change: Change, took: float) -> Step:
    trees = {"as stated": fit.tree, change.why: other.tree}
    names = list(fit.sites.parameters)
    table = compare_fits(trees, var_names=names).parameters
    rows = table.xs(change.why, level="fit")
    first = table.xs("as stated", level="fit")
    shift = ((rows["mean"] - first["mean"]) / first["sd"]).astype(float)
    certain = rows["in_errors"].astype(float) > _ERRORS
    # Monte Carlo error of a change that is not certain is no change.
    size = shift.abs().where(certain, 0.0)
    shown = rows[["mean", "sd"]].assign(
        stated_mean=first["mean"], stated_sd=first["sd"], shift=shift
    )
    largest = float(size.max()) if len(size) else 0.0
    moved = [f"{label} by {shift[label]:+.2f} sd" for label in size.index if size[label] > _SMALL]
    level: Level = "good"
    if largest > _SMALL:
        level = "bad" if change.grave and largest > _LARGE else "look"
    words = f"{change.why}: "
    words += f"it moves {', '.join(moved[:6])}" if moved else "no parameter moves"
    if moved and change.name == "grid":
        words += "; refine the grid until none does"
    return Step(
        name,
        level,
        words,
        table=shown,
        result=other,
        draw=lambda: plot_fits(trees, names)[0].figure,
        seconds=took,
    )


def power_scaling(fit: CheckedFit) -> Step:
    """How the posterior moves with a prior, or a likelihood, of half and of twice the strength.

    By importance weights of the draws, without a refit. A posterior that moves with the prior and
    not with the data is the prior's; one that moves with both is a compromise between them.

    Args:
        fit: From `nsde.checking.fit`.

    Returns:
        The verdict, whose table has the shifts of means in posterior standard deviations.

    Source: see the module's description.

    Example:
        >>> import numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 10.0), obs=y)
        >>> found = nsde.checking.fit(model, 100.0, progress=False)
        >>> nsde.checking.power_scaling(found).level  # the prior speaks, against the data
        'look'
    """
    name = "strength of prior and data"
    if not fit.sites.parameters:
        return Step(name, "not done", "the model has no parameters")
    with stopwatch() as seconds:
        log_prior, log_data = _log_densities(fit)
        rows = {}
        for label, values in _scalars(fit.parameters).items():
            row = {}
            for what, logs in (("prior", log_prior), ("data", log_data)):
                for how, power in _POWERS.items():
                    row[f"{what} {how}"] = _shift(values, (power - 1.0) * logs)
            rows[label] = row
        took = seconds()
    import pandas as pd

    table = pd.DataFrame.from_dict(rows, orient="index")
    prior = table[[c for c in table if c.startswith("prior")]].abs().max(axis=1)
    strong = [f"{label} ({prior[label]:.2f} sd)" for label in prior.index if prior[label] > _LARGE]
    unknown = int(table.isna().any(axis=1).sum())
    words = "no posterior hangs on the strength of its prior"
    if strong:
        words = f"a prior of half or twice the strength moves {', '.join(strong[:6])}"
    if unknown:
        words += "; where a number is missing the change is too large for weights"
    return Step(name, "look" if strong else "good", words, table=table, seconds=took)


def _scalars(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name if not e else f"{name}[{', '.join(map(str, e))}]": np.asarray(
            value[(slice(None), *e)], np.float64
        )
        for name, value in values.items()
        for e in list(np.ndindex(value.shape[1:]))[:20]
    }


def _shift(values: np.ndarray, log_ratio: np.ndarray) -> float:
    """Shift of the mean in sds under weights; NaN where they carry nothing."""
    sd = float(values.std())
    if sd == 0.0 or np.ptp(log_ratio) == 0.0:
        return 0.0
    weights, khat = smooth_log_weights(log_ratio)
    if khat > _KHAT:
        return float("nan")
    share = np.exp(weights - logsumexp(weights))
    return float((share @ values - values.mean()) / sd)


def _log_densities(fit: CheckedFit) -> tuple[np.ndarray, np.ndarray]:
    """Log prior of the parameters and log likelihood of the data at each draw."""
    posterior = get_group(fit.tree, "posterior")
    paths = [n for n in fit.sites.paths if n in posterior and n not in fit.sites.data]
    integrated = set(fit.sites.paths) - set(paths) - set(fit.sites.data)
    names = [*fit.sites.parameters, *(paths if not integrated else [])]
    values = {name: np.asarray(posterior[name].values) for name in names}
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in values.items()}
    # Where paths are integrated out the treated model has the likelihood of the parameters.
    model = fit.treat(fit.model) if integrated else fit.model
    draws = Draws("draws", "draws", {}, {}, {}, model, fit.args, fit.kwargs, {})
    parameters, data = set(fit.sites.parameters), set(fit.sites.data)

    def collect(trace: Mapping[str, Any]) -> dict[str, Array]:
        def total(wanted: set[str]) -> Array:
            parts = [jnp.sum(_scaled(site)) for name, site in trace.items() if name in wanted]
            return sum(parts, start=jnp.zeros(()))

        return {"prior": total(parameters), "data": total(data)}

    number = len(next(iter(flat.values())))
    found = evaluate_model(draws, flat, number, jax.random.key(0), collect)
    return found["prior"].astype(np.float64), found["data"].astype(np.float64)


def _scaled(site: Mapping[str, Any]) -> Array:
    density: Array = site["fn"].log_prob(site["value"])
    return density if site["scale"] is None else site["scale"] * density
