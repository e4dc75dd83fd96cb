#!/usr/bin/env bash
# The newest NumPyro, JAX and ArviZ on Python 3.12 and 3.13: environments under .newest, the default
# tests of what touches them (XLA's options and cache, programs found again, all that ArviZ reads),
# and the slow ones of conversion and comparison. A Python that is not installed is skipped, and said
# so.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# As `make test` has it: compiling is most of the work.
export XLA_FLAGS="--xla_backend_optimization_level=1 ${XLA_FLAGS:-}"
ran=0
for python in python3.12 python3.13; do
    if ! command -v "$python" > /dev/null; then
        echo "skipped: $python is not installed; .github/workflows/newest.yml runs it"
        continue
    fi
    env="$root/.newest/$python"
    [ -d "$env" ] || "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
        "numpyro" "jax" "arviz>=1" "$root[test]"
    "$env/bin/python" -c "import arviz, jax, numpyro; print(arviz.__version__, jax.__version__, numpyro.__version__)"
    (cd "$root" && "$env/bin/python" -m pytest -q -n 0 tests/runtime tests/diagnostics tests/checking \
        tests/models tests/core tests/fields/test_bands.py)
    (cd "$root" && "$env/bin/python" -m pytest -q -n 0 -m slow tests/models/test_dims.py \
        tests/diagnostics/test_convert.py tests/diagnostics/test_compare.py)
    ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || echo "0 passed, 0 failed, 2 skipped"
