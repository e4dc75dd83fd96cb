#!/usr/bin/env bash
# Build a wheel, install it alone in a fresh environment of each Python that is found, and run the
# first examples of the README and of the documentation, outside of the repository: what a user gets
# from `pip install numpyro-sde`.
#   tools/check_wheel.sh [--lowest] [/path/to/python3.12 ...]   (default: 3.11, 3.12 and 3.13)
# With --lowest it has the lowest versions that pyproject.toml admits of what the package needs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/tools/pythons.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pins=()
if [ "${1:-}" = --lowest ]; then
    shift
    pins=(--constraint "$work/lowest.txt")
fi
[ $# -gt 0 ] || set -- python3.11 python3.12 python3.13
mapfile -t pythons < <(usable_pythons "$@")
[ ${#pythons[@]} -gt 0 ] || { echo "no interpreter found among: $*; name one by PYTHON=..." >&2; exit 1; }
"${pythons[0]}" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check build
"$work/build/bin/python" "$root/tools/lowest.py" > "$work/lowest.txt"
"$work/build/bin/python" -m build --wheel --sdist --outdir "$root/dist" "$root" > "$work/build.log" ||
    { cat "$work/build.log"; exit 1; }
wheel=$(ls -t "$root"/dist/numpyro_sde-*.whl | head -1)
for python in "${pythons[@]}"; do
    name=$(name_of_python "$python")
    "$python" -m venv "$work/$name"
    "$work/$name/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}" "$wheel"
    (cd "$work" && env -u PYTHONPATH "$work/$name/bin/python" "$root/tools/first_example.py")
    echo "passed: $(basename "$wheel") alone on $name${pins[0]:+, lowest versions}"
done
