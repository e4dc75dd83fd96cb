"""Arrays that a compiled function closes over, as its arguments instead of constants in it.

NumPyro's kernels close over the data, so that their compiled programs are good for these data
alone. JAX can hand closed-over arrays over at run time, and announces that it will always do so;
until then its setting is read in part at the import of JAX. What that import would do is done here
late. `tests/runtime/test_cache.py` fails where a release of JAX has changed it.
"""

from __future__ import annotations

import dataclasses

import jax

_SETTING = "jax_use_simplified_jaxpr_constants"
_FIELD = "hoist_constants_as_args"


def pass_closed_over_arrays() -> bool:
    """Make arrays that functions close over arguments of what is compiled from now on.

    Returns:
        Whether this JAX can; where it cannot, nothing is changed.
    """
    if getattr(jax.config, _SETTING, False):
        return True
    try:
        from jax._src.array import ArrayImpl
        from jax._src.core import literalable_types
        from jax._src.interpreters.mlir import LoweringParameters
    except ImportError:
        return False
    names = [field.name for field in dataclasses.fields(LoweringParameters)]
    defaults = list(LoweringParameters.__init__.__defaults__ or ())
    if _FIELD not in names or not hasattr(jax.config, _SETTING):
        return False
    # Defaults are those of the last arguments.
    defaults[names.index(_FIELD) - len(names)] = True
    jax.config.update(_SETTING, True)
    literalable_types.add(ArrayImpl)
    LoweringParameters.__init__.__defaults__ = tuple(defaults)
    return True
