#!/usr/bin/env bash
# The newest NumPyro, JAX and ArviZ (1.x) on Python 3.12 and 3.13, or on the interpreters named:
#   tools/check_newest.sh [/path/to/python3.13 ...]
# For each it makes an environment under .newest (kept; the next call upgrades it), prints the versions,
# runs the default tests of what touches those packages (XLA's options and cache, programs found again,
# all that ArviZ reads), and the slow ones of conversion and comparison. TESTS="tests tests/..." runs
# these by default settings instead: TESTS=tests is the whole default suite. A Python that is not
# there is skipped, and said so; it fails where none is there. Every environment is tested; it fails
# at the end if a test did.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/tools/pythons.sh"
[ $# -gt 0 ] || set -- python3.12 python3.13
mapfile -t pythons < <(usable_pythons "$@")
[ ${#pythons[@]} -gt 0 ] || { echo "no interpreter found among: $*; name one by PYTHON=..." >&2; exit 1; }
# As `make test` has it: compiling is most of the work.
export XLA_FLAGS="--xla_backend_optimization_level=1 ${XLA_FLAGS:-}"
touched="tests/runtime tests/diagnostics tests/checking tests/models tests/core tests/fields/test_bands.py"
slow="tests/models/test_dims.py tests/diagnostics/test_convert.py tests/diagnostics/test_compare.py"
cd "$root"
failed=()
for python in "${pythons[@]}"; do
    name=$(name_of_python "$python")
    env=".newest/$name"
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
        numpyro jax "arviz>=1" ".[test]"
    "$env/bin/python" -c "import arviz, jax, numpyro, sys
print('Python', sys.version.split()[0], 'ArviZ', arviz.__version__, 'JAX', jax.__version__,
      'NumPyro', numpyro.__version__)"
    # shellcheck disable=SC2086 # lists of paths
    "$env/bin/python" -m pytest -q -n 0 ${TESTS:-$touched} || failed+=("$name")
    # shellcheck disable=SC2086
    [ -n "${TESTS:-}" ] || "$env/bin/python" -m pytest -q -n 0 -m slow $slow || failed+=("$name, slow")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
