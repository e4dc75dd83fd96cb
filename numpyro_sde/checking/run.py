"""From data to a checked answer in one call."""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpyro
from jaxtyping import PRNGKeyArray

from numpyro_sde.checking.calibrated import posterior_sbc
from numpyro_sde.checking.engines import Engine
from numpyro_sde.checking.fitting import CheckedFit, fit
from numpyro_sde.checking.predictive import predictive_check, residual_check
from numpyro_sde.checking.refits import power_scaling, sensitivity
from numpyro_sde.checking.report import CheckReport
from numpyro_sde.checking.steps import Budget, Step

# Of the budget for the fit, and of what is left after the cheap steps for calibration.
_FIT_SHARE, _CALIBRATION_SHARE = 0.4, 0.55


def check(
    model: Callable[..., Any],
    *args: Any,
    engine: Engine | None = None,
    treat: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    time_budget: float = 180.0,
    report: str | os.PathLike[str] | None = None,
    rng_key: PRNGKeyArray | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CheckReport:
    """Fit a model, criticise the fit, and say in words whether to use it.

    In order: each path gets its treatment (`nsde.reparam.auto`) and the model is fitted; data as
    the fit makes them are set beside the data; one-step residuals are tested; prior and data are
    made stronger and weaker; the engine is calibrated around its own posterior; grid, scheme and
    noise are changed and the model refitted. Each is a function of `nsde.checking` on its own.

    A fit is judged by chance at the level of 1 % in each step, so that a right model with a right
    engine fails some five of a hundred checks: look at the numbers. It compares no models
    (`diagnostics.compare_models` does), and a model that passes is not thereby true.

    Args:
        model: The plain model: its paths as it states them, with its data.
        *args: Its positional arguments, data included.
        engine: What makes of a (treated) model a NumPyro kernel, a guide or an `SVI`: a class such
            as `NUTS`, `AutoNormal`, `nsde.guides.AutoFlow`, or a function. None is `NUTS`.
        treat: What treats the paths; None is `nsde.reparam.auto`. `lambda model: model` leaves
            them as they are, for kernels of particles.
        time_budget: Seconds for all. A step begins only if it is likely to end in time, and says
            so if not; a compilation that has begun is not interrupted.
        report: A file for the page, one HTML file with its pictures inside; None writes none.
        rng_key: None is `jax.random.key(0)`.
        model_kwargs: Keyword arguments of the model.
        progress: Say on standard error what is done.

    Returns:
        A `CheckReport`: `.ok`, `.verdict`, `.steps`, `.tree` for ArviZ, `.write(path)`.

    Raises:
        TypeError: `engine` or `treat` is no function, or makes what is no engine.
        ValueError: A budget that is not positive, or a model that is treated already.
        TimeoutError: The warm-up did not end within its share of the budget.
        ImportError: ArviZ is not installed, or Matplotlib for a page.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     walk = nsde.processes.BrownianMotion(0.0, scale)
        ...     numpyro.sample("y", nsde.SDEPath(walk, np.arange(10.0), init=0.0), obs=y)
        >>> y = np.array([0.0, 0.3, -0.1, 0.4, 1.2, 0.9, 1.5, 1.1, 1.0, 1.8])
        >>> report = nsde.check(model, y, time_budget=20.0, progress=False)
        >>> report.ok, report["sensitivity to grid"].words
        (True, 'the transition is exact, whatever the step')
    """
    budget = Budget(time_budget)
    key = jax.random.key(0) if rng_key is None else rng_key
    keys = jax.random.split(key, 5)
    found = fit(
        model,
        *args,
        engine=engine,
        treat=treat,
        time_budget=_FIT_SHARE * time_budget,
        rng_key=keys[0],
        model_kwargs=model_kwargs,
        progress=progress,
    )
    steps = _criticised(found, budget, keys[1:], progress)
    result = CheckReport(
        title=getattr(model, "__name__", type(model).__name__),
        steps=steps,
        fit=found,
        code=_code(model, time_budget, key),
        seconds=time_budget - budget.left,
        about=_about(found, time_budget - budget.left),
    )
    if report is not None:
        result.write(report)
    return result


def _criticised(
    found: CheckedFit, budget: Budget, keys: PRNGKeyArray, progress: bool
) -> dict[str, Step]:
    """All steps on a fit, the cheap ones first."""
    _tell(progress, found.step)
    steps = {"fit": replace(found.step, code=_CODE["fit"])}

    def add(made: Callable[[], Step | list[Step]], name: str) -> None:
        for step in _guarded(made, name):
            steps[step.name] = replace(step, code=_CODE.get(step.name, ""))
            _tell(progress, step)

    add(lambda: predictive_check(found, rng_key=keys[0]), "posterior predictive")
    add(lambda: residual_check(found, rng_key=keys[1]), "one-step residuals")
    add(lambda: power_scaling(found), "strength of prior and data")
    calibration = _CALIBRATION_SHARE * budget.left
    if budget.left < found.seconds:
        left = f"a refit takes some {found.seconds:.0f} s, {max(budget.left, 0):.0f} s are left"
        late = Step("posterior calibration", "not done", left)
        add(lambda: late, late.name)
    else:
        add(
            lambda: posterior_sbc(
                found, time_budget=calibration, rng_key=keys[2], progress=progress
            ),
            "posterior calibration",
        )
    rest = max(budget.left, 1e-3)
    if found.step.level == "bad":  # two fits that are wrong say nothing of each other
        useless = Step("sensitivity", "not done", "the fit itself is not to be trusted")
        add(lambda: useless, useless.name)
    else:
        add(
            lambda: sensitivity(found, time_budget=rest, rng_key=keys[3], progress=progress),
            "sensitivity",
        )
    return steps


def _guarded(made: Callable[[], Step | list[Step]], name: str) -> list[Step]:
    """The steps that a function makes, or one that says why there is none."""
    try:
        found = made()
    except (TypeError, ValueError, NotImplementedError, FloatingPointError) as error:
        return [Step(name, "not done", f"{type(error).__name__}: {str(error).splitlines()[0]}")]
    return found if isinstance(found, list) else [found]


def _tell(progress: bool, step: Step) -> None:
    if progress:
        sys.stderr.write(f"\r{f'[{step.level}] {step.name}: {step.words}':<68}\n")
        sys.stderr.flush()


_CODE = {
    "fit": "found = nsde.checking.fit(model, *args)",
    "posterior predictive": "nsde.checking.predictive_check(found)",
    "one-step residuals": "nsde.checking.residual_check(found)",
    "strength of prior and data": "nsde.checking.power_scaling(found)",
    "posterior calibration": "nsde.checking.posterior_sbc(found)",
    "sensitivity to grid": 'nsde.checking.sensitivity(found, "grid")',
    "sensitivity to scheme": 'nsde.checking.sensitivity(found, "scheme")',
    "sensitivity to noise": 'nsde.checking.sensitivity(found, "noise")',
}


def _code(model: Callable[..., Any], time_budget: float, key: PRNGKeyArray) -> str:
    """Python that repeats the check: the model as far as its source is known."""
    try:
        source = textwrap.dedent(inspect.getsource(model)).rstrip()
    except (OSError, TypeError):
        source = "# the model's source is not known"
    name = getattr(model, "__name__", "model")
    data = jax.random.key_data(key).ravel().tolist()
    seed = f"jax.random.wrap_key_data(jax.numpy.array({data}, dtype='uint32'))"
    if data[:-1] == [0] and data[-1] < 2**31:
        seed = f"jax.random.key({data[-1]})"
    return (
        "import jax\nimport numpy as np\nimport numpyro\nimport numpyro.distributions as dist\n"
        "import numpyro_sde as nsde\n\n"
        f"{source}\n\n\nargs = ...  # the model's arguments, the data included\n"
        f"report = nsde.check({name}, *args, time_budget={time_budget:g}, rng_key={seed})\n"
        "print(report)\n"
    )


def _about(found: CheckedFit, seconds: float) -> dict[str, str]:
    import numpyro_sde

    treatments = ", ".join(f"{n}: {t}" for n, t in found.treatments.items())
    engine = getattr(found.engine, "__name__", type(found.engine).__name__)
    return {
        "paths": treatments or "treated by the caller",
        "engine": "NUTS" if engine == "default_engine" else engine,
        "parameters": ", ".join(found.sites.parameters) or "none",
        "data": ", ".join(f"{n} {v.shape}" for n, v in found.sites.observed.items()),
        "seconds": f"{seconds:.0f}",
        "versions": f"numpyro_sde {numpyro_sde.__version__}, NumPyro {numpyro.__version__}, "
        f"JAX {jax.__version__}, on {jax.devices()[0].platform}",
    }
