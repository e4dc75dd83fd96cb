#!/usr/bin/env bash
# Build a wheel, install it alone in a fresh environment of each Python that is found, and run the
# first example, outside of the repository: what a user gets from `pip install numpyro-sde`.
#   tools/check_wheel.sh [python3.12 ...]   (default: 3.11, 3.12 and 3.13, those there are)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pythons=("$@")
[ ${#pythons[@]} -gt 0 ] || pythons=(python3.11 python3.12 python3.13)
builder=${PYTHON:-python3}
"$builder" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check build
"$work/build/bin/python" -m build --wheel --sdist --outdir "$root/dist" "$root" > "$work/build.log" ||
    { cat "$work/build.log"; exit 1; }
wheel=$(ls -t "$root"/dist/numpyro_sde-*.whl | head -1)
ran=0
for python in "${pythons[@]}"; do
    if ! command -v "$python" > /dev/null; then
        echo "skipped: $python is not installed"
        continue
    fi
    "$python" -m venv "$work/$python"
    "$work/$python/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
    (cd "$work" && env -u PYTHONPATH "$work/$python/bin/python" "$root/tools/first_example.py")
    ran=$((ran + 1))
    echo "passed: $(basename "$wheel") alone on $python"
done
[ "$ran" -gt 0 ] || { echo "no interpreter found among: ${pythons[*]}"; exit 1; }
