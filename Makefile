# Two targets do all set-up on a machine with Python 3.11 (or later), pip and make:
#   make demo    fit real data, print the comparison, write plots and results
#   make test    the default test suite
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# By file: tests of one file share their compiled functions.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all lint bench docs gallery wheel lowest newest clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py --output demo_output

# Compiling is most of the work of the default suite: XLA leaves most optimisations out, generates the
# code of a program in one piece (each core has a worker of its own: an eighth less), and
# tests/conftest.py asks for loops as single kernels. The slow tests have the optimisations.
QUICK_XLA := --xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1
test: $(STAMP)
	XLA_FLAGS="$(QUICK_XLA) $(XLA_FLAGS)" $(PYTEST)

# The default suite, then the slow tests file by file, each with a time limit; `make test-all-2` is the
# second of four pieces of these. A run that was cut off goes on where it stopped.
test-all: test
	PYTHON=$(BIN)/python tools/run_slow.sh

test-all-%: $(STAMP)
	PYTHON=$(BIN)/python tools/run_slow.sh -p $*/4

# Undefined names apart: in the package jaxtyping's shape strings would look like some.
lint: $(STAMP)
	$(BIN)/ruff check numpyro_sde tests benchmarks examples tools
	$(BIN)/ruff check --isolated --select F821 tests benchmarks examples tools
	$(BIN)/ruff format --check numpyro_sde tests benchmarks examples tools
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -m '' -p no:xdist -s --benchmark-columns=median

# The site, strictly: a warning or a broken link is an error. The pages of the gallery are made of the
# examples' headers.
DOCS_STAMP := $(VENV)/.docs
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

gallery: $(STAMP)
	$(BIN)/python tools/gallery.py

docs: $(DOCS_STAMP) gallery
	$(BIN)/mkdocs build --strict --site-dir build/site

# The three below take each interpreter that they find, or those named:
# `make newest PYTHON=/opt/python3.13/bin/python3`.
NAMED = $(if $(filter-out file undefined,$(origin PYTHON)),$(PYTHON))

# A wheel, installed alone in a fresh environment, runs the first examples; on Python 3.11 to 3.13.
wheel:
	tools/check_wheel.sh $(NAMED)

# The same with the lowest versions that pyproject.toml admits of what the package needs, on Python 3.11.
lowest:
	tools/check_wheel.sh --lowest $(or $(NAMED),python3.11)

# The newest NumPyro, JAX and ArviZ (1.x, whose trees are xarray's) on Python 3.12 and 3.13: the tests
# of what they touch; `make newest TESTS=tests` runs the whole default suite there.
newest:
	TESTS="$(TESTS)" tools/check_newest.sh $(NAMED)

clean:
	rm -rf build dist .newest $(VENV) demo_output .test-all .pytest_cache .ruff_cache .mypy_cache
