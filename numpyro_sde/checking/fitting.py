"""The first step of a check: treatments chosen, the model fitted within a budget of time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from numpyro.infer import SVI
from numpyro.infer.mcmc import MCMCKernel

from numpyro_sde.checking.engines import Chain, Engine, build, default_engine
from numpyro_sde.checking.replicas import Anatomy, anatomy
from numpyro_sde.checking.steps import Budget, Step, stopwatch
from numpyro_sde.diagnostics.compare.arviz_compat import get_group
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.draws import Draws
from numpyro_sde.diagnostics.compare.fits import SVIFit
from numpyro_sde.diagnostics.compare.fits_compared import compare_fits
from numpyro_sde.diagnostics.compare.guide_quality import guide_quality
from numpyro_sde.diagnostics.compare.path_places import strip_treatments
from numpyro_sde.diagnostics.compare.plots import plot_fits
from numpyro_sde.diagnostics.compare.statistics import khat_threshold
from numpyro_sde.guides.training import fit_svi
from numpyro_sde.reparam.automatic import auto
from numpyro_sde.runtime.clock import Stopwatch

_LEAST_DRAWS = 20  # of each chain, whatever they cost
_NUM_CHAINS, _NUM_WARMUP, _NUM_DRAWS = 4, 300, 400
_GUIDE_STEPS, _GUIDE_DRAWS = 6000, 2000
_FEWEST = 2  # chains that are started whatever they cost


@dataclass(frozen=True, eq=False)
class CheckedFit:
    """A fit with all that further steps need; prints as its verdict.

    Attributes:
        model: The plain model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        treat: What treats its paths.
        engine: What makes a kernel or guide of a treated model.
        treatments: How each path is treated.
        sites: What the sites of the model are.
        draws: The fit as the diagnostics read it: draws of a chain, or an `SVIFit`.
        tree: The same for ArviZ, from `to_arviz`.
        step: The verdict on it.
        seconds: What fitting took, compilation included.
        num_steps: Warm-up iterations of a chain, or steps of a guide, that were needed.
        seconds_per_iteration: What one of either took, without compiling.

    Example:
        >>> import numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> found = nsde.checking.fit(model, 0.5, num_chains=2, progress=False)
        >>> found.sites.parameters, found.is_variational
        (('a',), False)
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    treat: Callable[[Callable[..., Any]], Callable[..., Any]]
    engine: Engine
    treatments: Mapping[str, str]
    sites: Anatomy
    draws: Any
    tree: Any
    step: Step
    seconds: float
    num_steps: int
    seconds_per_iteration: float

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Draws of the parameters, chains joined, `(draw, ...)`."""
        posterior = get_group(self.tree, "posterior")
        found = {name: np.asarray(posterior[name].values) for name in self.sites.parameters}
        return {name: v.reshape(-1, *v.shape[2:]) for name, v in found.items()}

    @property
    def is_variational(self) -> bool:
        """Whether it is the fit of a guide."""
        return isinstance(self.draws, SVIFit)

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self.step)

    def _repr_html_(self) -> str:
        return self.step._repr_html_()


def fit(
    model: Callable[..., Any],
    *args: Any,
    engine: Engine | None = None,
    treat: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    num_chains: int = _NUM_CHAINS,
    num_warmup: int = _NUM_WARMUP,
    num_draws: int = _NUM_DRAWS,
    time_budget: float = 120.0,
    rng_key: PRNGKeyArray | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CheckedFit:
    """Choose the treatment of each path, fit, and say whether the draws can be used.

    Args:
        model: The plain model: its paths as it states them, with its data.
        *args: Its positional arguments.
        engine: What makes of a (treated) model a NumPyro kernel, a guide or an `SVI`: a class such
            as `NUTS`, `AutoNormal`, `nsde.guides.AutoFlow`, or a function. None is `NUTS`.
        treat: What treats the paths; None is `nsde.reparam.auto`. `lambda model: model` leaves
            them as they are, for kernels of particles.
        num_chains: Chains, run one after the other; fewer where time is short, at least two.
        num_warmup: Warm-up iterations of each.
        num_draws: Draws of each; fewer where time is short.
        time_budget: Seconds; compiling is not interrupted.
        rng_key: None is `jax.random.key(0)`.
        model_kwargs: Keyword arguments of the model.
        progress: Say on standard error what is done.

    Raises:
        TypeError: `engine` or `treat` is no function, or makes what is no engine.
        ValueError: A model that is treated already.
        TimeoutError: The warm-up did not end within the budget.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> found = nsde.checking.fit(model, 0.5, progress=False)
        >>> found.step.ok, found.parameters["a"].shape
        (True, (1600,))
    """
    kwargs = dict(model_kwargs or {})
    engine, treat = engine or default_engine, treat or auto
    for name, value in (("engine", engine), ("treat", treat)):
        if not callable(value):
            raise TypeError(f"{name} must be a function of a model, got {type(value).__name__}")
    if strip_treatments(model)[0] is not model or isinstance(model, auto):
        raise ValueError("model is treated already: give the plain model, and treat= for its paths")
    key = jax.random.key(0) if rng_key is None else rng_key
    sites = anatomy(model, args, kwargs)
    treated = treat(model)
    treatments = treated.treatments(*args, **kwargs) if isinstance(treated, auto) else {}
    budget = Budget(time_budget)
    made = build(engine, treated)
    key_run, key_convert = jax.random.split(key)
    with stopwatch() as seconds, Stopwatch() as watch:
        if isinstance(made, SVI):
            draws: Any = _train(made, key_run, args, kwargs, budget, progress)
            num_steps = iterations = len(draws.result.losses)
        else:
            sizes = num_chains, num_warmup, num_draws
            draws = _sample(made, treated, key_run, args, kwargs, sizes, budget, progress)
            num_steps = num_warmup
            chains, drawn = next(iter(draws.posterior.values())).shape[:2]
            iterations = chains * (num_warmup + drawn)
        running = seconds() - watch.seconds("compile") - watch.seconds("trace")
        tree = to_arviz(draws, num_samples=_GUIDE_DRAWS, rng_key=key_convert, log_likelihood=False)
        took = seconds()
        step = _verdict(treated, args, kwargs, treatments, draws, tree, took)
    return CheckedFit(
        model,
        args,
        kwargs,
        treat,
        engine,
        treatments,
        sites,
        draws,
        tree,
        step,
        took,
        num_steps,
        max(running, 0.0) / max(iterations, 1),
    )


def _train(
    svi: SVI, key: PRNGKeyArray, args: Any, kwargs: Any, budget: Budget, progress: bool
) -> SVIFit:
    _say(progress, f"training {type(svi.guide).__name__}")
    result = fit_svi(
        svi, key, _GUIDE_STEPS, *args, time_limit=budget.left, progress_bar=False, **kwargs
    )
    return SVIFit(svi, result, args, kwargs)


def _sample(
    kernel: MCMCKernel,
    model: Callable[..., Any],
    key: PRNGKeyArray,
    args: Any,
    kwargs: Any,
    sizes: tuple[int, int, int],
    budget: Budget,
    progress: bool,
) -> Draws:
    """Warm chains up one after the other, then draw from them in turn until time is up."""
    num_chains, num_warmup, num_draws = sizes
    chain = Chain(kernel, num_warmup, args, kwargs)
    states: list[Any] = []
    for index, own in enumerate(jax.random.split(key, num_chains)):
        with stopwatch() as seconds:
            label = f"chain {index + 1} of {num_chains}"
            states.append(_warm_up(chain, own, budget, label, progress))
            # Another costs as much again, and as many draws as it took iterations to warm up.
            cost = seconds() * (1.0 + num_draws / num_warmup)
        if len(states) >= _FEWEST and budget.left < cost * (len(states) + 1) / 2:
            break
    pieces: list[list[Any]] = [[] for _ in states]
    done = 0
    while done < num_draws and (done < _LEAST_DRAWS or budget.left > 0.0):
        _say(progress, f"{len(states)} chains, draw {done} of {num_draws}")
        count = chain.pace.next(num_draws - done)  # the same of each chain
        for index, state in enumerate(states):
            states[index], *kept = chain.advance(state, count)
            pieces[index].append(kept)
        done += count
    raw = [jax.tree.map(lambda *rows: np.concatenate(rows), *(p[0] for p in own)) for own in pieces]
    draws = _stacked([[chain.constrain(own)] for own in raw])
    statistics = _stacked([[piece[1] for piece in own] for own in pieces])
    if "potential_energy" in statistics:
        statistics["lp"] = -statistics.pop("potential_energy")
    engine = type(kernel).__name__
    return Draws("mcmc", engine, draws, statistics, {}, model, args, kwargs, {})


def _warm_up(chain: Chain, key: PRNGKeyArray, budget: Budget, label: str, progress: bool) -> Any:
    """The state of a chain after its warm-up.

    Raises:
        TimeoutError: The budget ended before.
    """
    state, done = chain.start(key), 0
    while done < chain.num_warmup:
        if budget.left < 0.0:
            raise TimeoutError(
                f"time_budget={budget.seconds:.0f} s ended after {done} of {chain.num_warmup} "
                f"warm-up iterations of {label}: give more, or a cheaper engine"
            )
        _say(progress, f"{label}, warm-up {done}")
        count = chain.pace.next(chain.num_warmup - done)
        state, _, _ = chain.advance(state, count)
        done += count
    return state


def _stacked(chains: list[list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Pieces of each chain joined, chains in front."""
    names = chains[0][0]
    return {
        name: np.stack([np.concatenate([piece[name] for piece in own]) for own in chains])
        for name in names
    }


def _verdict(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    treatments: Mapping[str, str],
    draws: Any,
    tree: Any,
    seconds: float,
) -> Step:
    compared = compare_fits({"fit": tree})
    words = compared.verdicts["fit"].split("; not its elpd")[0]
    wrong = words.startswith(("do not", "use it as a proposal", "use its parameters"))
    level = "bad" if wrong else "good" if words == "use it" else "look"
    if "guided" in treatments.values() and isinstance(draws, Draws):
        level, words = _with_guide(model, args, kwargs, draws, level, words)
    how = ", ".join(f"{path} {treatment}" for path, treatment in treatments.items())
    table = compared.parameters
    if len(table):
        table = table.droplevel("fit")[_columns(table)]
    return Step(
        "fit",
        level,  # type: ignore[arg-type]
        f"{words} ({how})" if how else words,
        table=table if len(table) else None,
        result=tree,
        draw=lambda: plot_fits({"fit": tree})[0].figure,
        seconds=seconds,
    )


def _columns(table: Any) -> list[str]:
    wanted = ("mean", "sd", "rhat", "ess_bulk", "ess_tail")
    return [name for name in wanted if name in table and table[name].notna().any()]


def _with_guide(
    model: Callable[..., Any], args: Any, kwargs: Any, draws: Draws, level: str, words: str
) -> tuple[str, str]:
    """The verdict with what importance weights say of the guide of a guided path."""
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in draws.posterior.items()}
    num_draws = 300
    quality = guide_quality(
        model, flat, *args, rng_key=jax.random.key(0), num_points=3, num_draws=num_draws, **kwargs
    )
    khat = float(np.median(quality.khat))
    if khat <= khat_threshold(num_draws):
        return level, words
    more = (
        f"its guide misses part of the law of the path (k-hat {khat:.2f}): the sampler starts from "
        "it, so look for further modes of the path"
    )
    return ("look" if level == "good" else level), f"{words}; {more}"


def _say(progress: bool, text: str) -> None:
    if progress:
        sys.stderr.write(f"\rcheck: {text:<60}")
        sys.stderr.flush()
