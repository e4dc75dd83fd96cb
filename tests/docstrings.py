"""Runs the examples of one module, and lists the public objects whose examples users copy."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

import numpyro_sde

ROOT = Path(numpyro_sde.__file__).parent
PUBLIC_MODULES = [
    *("checking", "data"),
    *("datasets", "diagnostics", "distributions", "filters", "guides", "handlers", "infer"),
    "jumps",
    "laws",
    *("multiscale", "noise", "processes", "reparam", "schemes", "testing"),
]
NEEDS = {
    "checking": ("arviz", "matplotlib.pyplot"),
    "diagnostics": ("arviz", "matplotlib.pyplot"),
    "schemes.diffrax_solver": ("diffrax",),
    "infer.blackjax": ("blackjax",),
}


def modules_with_examples() -> dict[str, int]:
    """Number of example statements of each module that has any, by its dotted name."""
    counted = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if count := path.read_text(encoding="utf-8").count(" >>> "):
            counted[name] = count
    return counted


def public_names(module: ModuleType) -> list[str]:
    """Its `__all__`; where there is none, the classes it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


def public_objects() -> dict[str, Any]:
    """Every public object that is no module, by the name that users write."""
    found = {}
    for name in ["", *PUBLIC_MODULES]:
        module = importlib.import_module(f"numpyro_sde.{name}".rstrip("."))
        for public in public_names(module):
            value = getattr(module, public)
            if not inspect.ismodule(value):
                found[f"{name}.{public}".lstrip(".")] = value
    return found


def run_examples(name: str, expected: int) -> None:
    """Run every example of a module; those of public objects without the module's own names."""
    for prefix, packages in NEEDS.items():
        if f"{name}.".startswith(f"{prefix}."):
            for package in packages:
                pytest.importorskip(package)
    module = importlib.import_module(f"numpyro_sde.{name}")
    public = tuple(
        f"{value.__module__}.{value.__qualname__}." for value in public_objects().values()
    )
    runner = doctest.DocTestRunner()
    output: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        if f"{test.name}.".startswith(public):
            test.globs = {"__name__": "__main__"}
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
    # Examples where doctest does not look, such as wrapped methods, would pass unseen.
    assert runner.tries == expected
    assert not jax.config.jax_enable_x64, f"an example of {name} leaves float64 on"
