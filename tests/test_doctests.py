"""Every public name has an example, and examples print what they say.

Those of the core run in test_doctests_core.py: a file is the unit of parallel runs.
"""

from __future__ import annotations

from typing import Any

import pytest
from docstrings import modules_with_examples, public_objects, run_examples
from test_layers import PURE

MODULES = {
    name: count for name, count in modules_with_examples().items() if name.split(".")[0] not in PURE
}
PUBLIC = public_objects()
# Those that compile for more than five seconds.
SLOW = {
    *("checking.calibrated", "checking.fitting", "checking.predictive"),
    *("checking.run", "checking.refits"),
    "diagnostics.compare.guide_quality",
    "diagnostics.prediction.forecast",
    "diagnostics.prediction.leave_future",
    "distributions.jump_path",
    "infer.conditional_forward",
    "infer.evidence",
    "states.filtering",
    *("snapshots.bridge", "snapshots.interpolant", "snapshots.law", "snapshots.refine"),
    "testing.construction",
    "testing.engines",
    *("testing.contract", "guides.auto", "guides.flows"),
    *("infer.conditional", "infer.particle_gibbs", "infer.pmmh", "infer.parisian", "infer.score"),
    *("guides.path_laws", "guides.score", "guides.auto_path", "guides.training"),
    *("panels.fitting", "panels.chain", "panels.two_stage", "guides.amortized", "states.stream"),
    *("infer.metric", "infer.split_nuts", "infer.iterated_filtering", "infer.tempered"),
    *("multiscale.flow", "diagnostics.scales.scan", "distributions.fractional", "handlers"),
    *("guides.conjugate", "guides.conjugate_fit", "guides.matched", "guides.natural_fit"),
    *("infer.gamma_rates", "infer.collapsed_field", "infer.ibis"),
}


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MODULES]
)
def test_examples(module: str) -> None:
    run_examples(module, MODULES[module])


@pytest.mark.parametrize("value", PUBLIC.values(), ids=PUBLIC)
def test_public_name_has_an_example(value: Any) -> None:
    assert "Example:\n" in (value.__doc__ or "")
