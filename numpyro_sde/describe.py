"""How objects print: on a line inside others, as a block by `print`, as a table in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from typing import Any

import equinox as eqx
import jax
import numpy as np

_MAX_NUMBERS = 4  # of an array that are written out


def describe_value(value: Any) -> str:
    """A number, an array, a function or a module in few words.

    Example:
        >>> import numpy as np
        >>> describe_value(np.float64(0.1234567)), describe_value(np.zeros((3, 2)))
        ('0.1235', 'float64[3, 2]')
    """
    if isinstance(value, jax.core.Tracer):
        return f"traced {value.aval.str_short()}"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return "key"
        array = np.asarray(value)
        if array.ndim == 0:
            return _number(array.item())
        if array.ndim == 1 and array.size <= _MAX_NUMBERS:
            return f"[{', '.join(_number(v) for v in array.tolist())}]"
        return f"{array.dtype}{list(array.shape)}"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}={describe_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple | list) and len(value) <= _MAX_NUMBERS:
        return f"({', '.join(describe_value(v) for v in value)})"
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return repr(value) if len(repr(value)) < 60 else type(value).__name__


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_entries(tree: Any) -> list[tuple[str, str]]:
    """Names and values of parameters: of a mapping its entries, else one called `params`.

    Example:
        >>> describe_entries({"rate": 1.0, "scale": 0.5})
        [('rate', '1'), ('scale', '0.5')]
    """
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        return [(str(name), describe_value(value)) for name, value in tree.items()]
    return [("params", describe_value(tree))]


def path_entries(path: Any) -> list[tuple[str, str]]:
    """What to print of the law of a path: equation, times, start, scheme.

    Example:
        >>> import numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        >>> path_entries(nsde.SDEPath(ou, [0.0, 0.5, 2.0], init=0.3))[1]
        ('times', '3, 0 to 2')
    """
    start, known = path.fixed_start, not isinstance(path.times, jax.core.Tracer)
    span = f", {np.min(path.times):g} to {np.max(path.times):g}" if known else ""
    entries = [
        ("sde", repr(path.sde)),
        ("times", f"{path.num_times}{span}" if path.grid is None else repr(path.grid)),
        ("init", type(path.init).__name__ if start is None else describe_value(start)),
        ("scheme", describe_value(path.scheme)),
    ]
    if path.batch_shape:
        entries.append(("batch", str(path.batch_shape)))
    return entries


def one_line(name: str, entries: Iterable[tuple[str, str]]) -> str:
    """`Name(a=1, b=2)`.

    Example:
        >>> one_line("Brownian", [("scale", "0.5")])
        'Brownian(scale=0.5)'
    """
    return f"{name}({', '.join(f'{key}={value}' for key, value in entries)})"


def describe_module(module: eqx.Module) -> str:
    """A module of options on a line, those at their defaults left out.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.UnscentedKalman(kappa=1.0)
        UnscentedKalman(kappa=1)
    """
    import inspect

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(module).__init__).parameters.items()
    }
    entries = []
    for field in fields(module):
        value = getattr(module, field.name, None)
        default = defaults.get(field.name, inspect.Parameter.empty)
        plain = isinstance(value, int | float | str | bool | type(None))
        if not (plain and value == default):
            entries.append((field.name, describe_value(value)))
    return one_line(type(module).__name__, entries)


def block(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and a line for each entry, what `print` shows.

    Example:
        >>> print(block("OU", [("rate", "1"), ("noise", "Brownian()")]))
        OU
          rate   1
          noise  Brownian()
    """
    entries = list(rows)
    width = max((len(key) for key, _ in entries), default=0)
    return "\n".join([title, *(f"  {key:<{width}}  {value}" for key, value in entries)])


def html_text(text: str) -> str:
    """Text as it stands, for notebooks.

    Example:
        >>> html_text("k-hat < 0.7")
        '<pre>k-hat &lt; 0.7</pre>'
    """
    return f"<pre>{escape(text)}</pre>"


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A small table for notebooks.

    Example:
        >>> html_table("OU", [("rate", "1")])
        '<b>OU</b><table><tr><th>rate</th><td>1</td></tr></table>'
    """
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows
    )
    return f"<b>{escape(title)}</b><table>{cells}</table>"
