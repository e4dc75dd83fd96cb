"""The examples of the core, which knows nothing of NumPyro, print what they say."""

from __future__ import annotations

import pytest
from docstrings import modules_with_examples, run_examples
from test_layers import PURE

MODULES = {
    name: count for name, count in modules_with_examples().items() if name.split(".")[0] in PURE
}


# Those that compile for more than five seconds.
SLOW = {"filters.forward", "filters.particle", "filters.particle_result"}


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MODULES]
)
def test_examples(module: str) -> None:
    run_examples(module, MODULES[module])
