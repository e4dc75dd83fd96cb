"""ArviZ 0.23 and 1.x behind one small interface.

ArviZ 0.23 keeps results in its own `InferenceData`, ArviZ 1.x in an xarray `DataTree`, and some
statistics moved. This is the only file of the package that imports ArviZ or xarray, and it does
so when a function is called, so that both stay optional.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

_HINT = "needs ArviZ: pip install 'numpyro-sde[arviz]'"


def load_arviz() -> ModuleType:
    """The `arviz` module.

    Raises:
        ImportError: If ArviZ is not installed; the message says how to install it.

    Example:
        >>> load_arviz().__name__
        'arviz'
    """
    try:
        with warnings.catch_warnings():
            # 0.23 announces 1.x at every first import; a user of this package need not act.
            warnings.simplefilter("ignore", FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError(f"numpyro_sde.diagnostics {_HINT}") from error
    return arviz


def is_modern() -> bool:
    """Whether the installed ArviZ is 1.0 or later, which keeps results in a `DataTree`.

    Example:
        >>> is_modern() in (True, False)
        True
    """
    return int(load_arviz().__version__.split(".")[0]) >= 1


def is_tree(candidate: Any) -> bool:
    """Whether an object is a container of inference results of the installed ArviZ.

    Example:
        >>> is_tree({"posterior": 1.0})
        False
    """
    arviz = load_arviz()
    if is_modern():
        import xarray

        return isinstance(candidate, xarray.DataTree)
    return isinstance(candidate, arviz.InferenceData)


def make_dataset(
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> Any:
    """An `xarray.Dataset` of named arrays, keeping only the coordinates that they use.

    Args:
        variables: For each name its dimensions and its array.
        coords: Coordinates; a value is an array for a dimension of that name, or a pair
            (dimensions, array) for one that lies along other dimensions.
        attrs: Attributes of the data set, numbers and strings.

    Example:
        >>> import numpy as np
        >>> make_dataset({"a": (("draw",), np.zeros(3))}, {"draw": [0, 1, 2]}, {}).sizes["draw"]
        3
    """
    load_arviz()
    import xarray

    used = {dim for dims, _ in variables.values() for dim in dims}
    kept = {
        name: value
        for name, value in coords.items()
        if (set(value[0]) <= used if isinstance(value, tuple) else name in used)
    }
    return xarray.Dataset(dict(variables), coords=kept, attrs=dict(attrs))


def make_tree(groups: Mapping[str, Any]) -> Any:
    """Join data sets into an `InferenceData` (ArviZ 0.23) or a `DataTree` (1.x).

    Args:
        groups: Group name to `xarray.Dataset`.

    Example:
        >>> import numpy as np
        >>> posterior = make_dataset({"a": (("chain", "draw"), np.zeros((1, 3)))}, {}, {})
        >>> list_groups(make_tree({"posterior": posterior}))
        ['posterior']
    """
    arviz = load_arviz()
    if is_modern():
        import xarray

        return xarray.DataTree.from_dict(dict(groups))
    return arviz.InferenceData(**groups)


def list_groups(tree: Any) -> list[str]:
    """Names of the groups of a container, without leading slashes.

    Example:
        >>> list_groups(make_tree({}))
        []
    """
    names = tree.children if is_modern() else tree.groups()
    return [str(name) for name in names]


def get_group(tree: Any, name: str) -> Any:
    """One group as an `xarray.Dataset`, or None if the container has no such group.

    Example:
        >>> get_group(make_tree({}), "posterior") is None
        True
    """
    if name not in list_groups(tree):
        return None
    return tree[name].to_dataset() if is_modern() else tree[name]


def scalar_draws(
    dataset: Any, name: str, element: tuple[int, ...]
) -> Float[np.ndarray, "chain draw"]:
    """Draws of one element of a variable, float64.

    Args:
        dataset: A group with dimensions chain and draw.
        name: The variable.
        element: Indices along its other dimensions.

    Example:
        >>> import numpy as np
        >>> variable = (("chain", "draw", "k"), np.arange(6.0).reshape(1, 2, 3))
        >>> scalar_draws(make_dataset({"a": variable}, {}, {}), "a", (2,))
        array([[2., 5.]])
    """
    return np.asarray(dataset[name].values[(..., *element)], np.float64)


def effective_sample_size(draws: Float[np.ndarray, "chain draw"], method: str = "bulk") -> float:
    """Effective sample size of one quantity by ArviZ: `"bulk"`, `"tail"` or `"mean"`.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Bayesian Analysis 16,
    667-718; the tail is the smaller of the 5 % and 95 % quantiles' sizes.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(4, 250))
        >>> 600 < effective_sample_size(draws) < 1500
        True
    """
    extra = {"prob": (0.05, 0.95)} if method == "tail" else {}
    return float(load_arviz().ess(np.asarray(draws, np.float64), method=method, **extra))


def split_rhat(draws: Float[np.ndarray, "chain draw"]) -> float:
    """Rank-normalised split R-hat of one quantity by ArviZ (Vehtari et al. 2021).

    Of a single chain its two halves are compared.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(4, 250))
        >>> split_rhat(draws) < 1.02
        True
    """
    draws = np.asarray(draws, np.float64)
    if draws.shape[0] == 1:
        half = draws.shape[1] // 2
        draws = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    with np.errstate(invalid="ignore", divide="ignore"):  # a chain that never moves: NaN
        return float(load_arviz().rhat(draws))


def smooth_log_weights(
    log_weights: Float[np.ndarray, "*points draw"], relative_efficiency: float = 1.0
) -> tuple[Float[np.ndarray, "*points draw"], Float[np.ndarray, "*points"]]:
    """Pareto-smoothed log importance weights, normalised over the last axis, and their k-hat.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Journal of Machine Learning Research
    25 (72), through ArviZ.

    Args:
        log_weights: Unnormalised log weights, draws last.
        relative_efficiency: Effective over actual number of draws.

    Example:
        >>> import numpy as np
        >>> smoothed, khat = smooth_log_weights(np.random.default_rng(0).normal(size=1000))
        >>> bool(abs(np.exp(smoothed).sum() - 1) < 1e-6), bool(khat < 0.7)
        (True, True)
    """
    log_weights = np.asarray(log_weights, np.float64)
    arviz = load_arviz()
    if is_modern():
        from arviz_stats.base import array_stats

        # It takes log likelihoods, as leave-one-out has them: minus the log weights.
        smoothed, khat = array_stats.psislw(-log_weights, r_eff=relative_efficiency)
    else:
        smoothed, khat = arviz.psislw(log_weights, reff=relative_efficiency)
    return np.asarray(smoothed), np.asarray(khat)


def stacking_weights(
    elpd: Mapping[str, Float[np.ndarray, " n"]],
) -> dict[str, float]:
    """Weights of models whose mixture predicts best, by ArviZ's stacking.

    Source: Yao, Vehtari, Simpson and Gelman (2018), "Using stacking to average Bayesian
    predictive distributions", Bayesian Analysis 13, 917-1007.

    Args:
        elpd: For each model its log predictive density of every data point.

    Example:
        >>> import numpy as np
        >>> points = np.linspace(-2.0, -1.0, 50)
        >>> weights = stacking_weights({"good": points, "bad": points - 3.0})
        >>> {name: round(weight, 3) for name, weight in weights.items()}
        {'good': 1.0, 'bad': 0.0}
    """
    if len(elpd) == 1:
        return dict.fromkeys(elpd, 1.0)
    # Weights do not change with a shift of a point that all models share; exp() might vanish.
    top = np.max(list(elpd.values()), axis=0)
    data = {name: _elpd_data(values - top) for name, values in elpd.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the number of points: told by the caller
        if is_modern():
            table = load_arviz().compare(data, method="stacking", round_to="none")
        else:
            table = load_arviz().compare(data, ic="loo", method="stacking", scale="log")
    return {name: float(table.loc[name, "weight"]) for name in elpd}


def _elpd_data(points: Float[np.ndarray, " n"]) -> Any:
    """ArviZ's container of a pointwise predictive density."""
    import xarray

    number = points.size
    values = {
        "elpd": float(points.sum()),
        "se": float(np.sqrt(number * points.var())),
        "p": float("nan"),
        "n_samples": 1,
        "n_data_points": number,
        "warning": False,
        "scale": "log",
        "good_k": 0.7,
    }
    pointwise = xarray.DataArray(points, dims=("point",))
    khat = xarray.zeros_like(pointwise)
    if is_modern():
        from dataclasses import fields

        from arviz_stats.utils import ELPDData

        every = {**values, "kind": "loo", "elpd_i": pointwise, "pareto_k": khat}
        known = {field.name for field in fields(ELPDData) if field.init}
        return ELPDData(**{name: value for name, value in every.items() if name in known})
    from arviz.stats.stats_utils import ELPDData

    entries = {
        "elpd_loo": values["elpd"],
        "se": values["se"],
        "p_loo": values["p"],
        "n_samples": 1,
        "n_data_points": number,
        "warning": False,
        "loo_i": pointwise,
        "pareto_k": khat,
        "scale": "log",
        "good_k": 0.7,
    }
    return ELPDData(data=list(entries.values()), index=list(entries))
