"""The examples of the core, which knows nothing of NumPyro, print what they say."""

from __future__ import annotations

import pytest
from docstrings import modules_with_examples, run_examples
from test_layers import PURE

MODULES = {
    name: count for name, count in modules_with_examples().items() if name.split(".")[0] in PURE
}


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    run_examples(module, MODULES[module])
