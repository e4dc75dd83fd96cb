"""Imports point one way, the core knows nothing of NumPyro, optional packages stay optional."""

import ast
from pathlib import Path

import pytest

import numpyro_sde

ROOT = Path(numpyro_sde.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module may import from its own layer and from those before it.
LAYERS = [
    [
        "runtime",
        "linear.ranks",
        "linear.small",
        "linear.balance",
        "linear.discretize",
        "linear.affine",
    ],
    [
        *(
            "checks",
            "describe",
            "data",
            "grid",
            "noise",
            "interop",
            "sde",
            "dynamics",
            "schemes",
            "processes",
            "reparam.bridge",
        ),
        "jumps",
        *("site_guard", "parameters", "inputs", "events", "joining", "fields"),
        "laws",
        *("multiscale.slow_fast", "multiscale.rules", "multiscale.table", "multiscale.frozen"),
        *("multiscale.fast_law", "multiscale.effective", "multiscale.two_scale"),
        *("multiscale.cell_problem", "multiscale.green_kubo"),
    ],
    ["linear"],
    ["statespace"],
    ["smc"],
    ["filters"],
    ["distributions"],
    ["models"],
    ["observe", "accumulate", "collapse", "handlers", "reparam", "states", "effects"],
    ["guides", "infer", "multiscale", "snapshots"],
    ["diagnostics", "datasets", "testing", "panels"],
    ["checking"],
]
PURE = (
    *(
        "checks",
        "describe",
        "data",
        "grid",
        "noise",
        "sde",
        "dynamics",
        "schemes",
        "processes",
        "reparam.bridge",
    ),
    "runtime",
    "jumps",
    *("parameters", "inputs", "events"),
    "laws",
    *("linear", "statespace", "filters", "smc", "interop"),
    *("multiscale.slow_fast", "multiscale.rules", "multiscale.table", "multiscale.frozen"),
    *("multiscale.cell_problem", "multiscale.green_kubo"),
    *("multiscale.fast_law", "multiscale.effective", "multiscale.two_scale"),
)
OPTIONAL = (
    *("arviz", "arviz_base", "arviz_stats", "xarray", "pandas", "matplotlib", "diffrax"),
    *("cloudpickle", "submitit"),
    "blackjax",
    "ott",
    "optax",
)


def module_of(path):
    return (
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    )


def layer_of(module):
    found = [
        (len(name), rank)
        for rank, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def imports_of(path):
    """Modules imported, and whether at the top of the file; for type checking does not count."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                # `from package import module` imports the module, not the package's own names.
                inner = f"{node.module}.{alias.name}"
                path = ROOT.parent.joinpath(*inner.split("."))
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                yield inner if is_module else node.module, id(node) in lazy


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    module = module_of(path)
    rank = layer_of(module)
    if module == "":
        return  # the package itself gathers the public names
    assert rank is not None, f"{module} stands in no layer"
    for name, lazy in imports_of(path):
        if name.startswith("numpyro_sde.") and not lazy:
            other = name.removeprefix("numpyro_sde.")
            target = layer_of(other)
            assert target is not None, other
            assert target <= rank, f"{module} imports {other} from a layer above"
        if name.split(".")[0] == "numpyro":
            assert not {module, module.split(".")[0]} & set(PURE), f"{module} imports NumPyro"


def test_optional_packages_are_imported_late_and_in_one_file():
    where = {}
    for path in FILES:
        for name, lazy in imports_of(path):
            package = name.split(".")[0]
            if name.startswith("numpyro_sde.interop."):
                assert lazy, f"{module_of(path)} imports {name} at its top"
            if package in OPTIONAL:
                bridge = module_of(path).startswith("interop.")
                assert lazy or bridge, f"{module_of(path)} imports {package} at its top"
                where.setdefault(package, set()).add(module_of(path))
    assert where, "no optional package found: the test looks at the wrong files"
    for package in ("arviz", "diffrax", "blackjax"):
        assert len(where[package]) == 1, (package, where[package])


def test_files_are_short_and_named_for_what_they_hold():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 500, path
        assert path.stem not in ("utils", "util", "helpers", "misc"), path
