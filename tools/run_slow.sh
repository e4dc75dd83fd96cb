#!/usr/bin/env bash
# Run the slow tests, one file at a time: each in a process of its own with a time limit, and a
# summary at the end. What passed at this commit is not run again, so a run that was cut off goes on
# where it stopped. Compiled programs are kept in .test-all/cache (or JAX_COMPILATION_CACHE_DIR).
#
#   tools/run_slow.sh [-p K/N] [-t SECONDS] [-l FOLDER] [-f] [FILE...]
#
#   -p K/N       the K-th of N pieces (files dealt out in turn); all by default
#   -t SECONDS   time limit of a file; 3600 by default
#   -l FOLDER    where logs go; .test-all/<commit> by default
#   -f           run again what has passed
#
# PYTHON names the interpreter (.venv/bin/python by default). Status 0: every file passed.
set -u
TIMEFORMAT=%U
cd "$(dirname "$0")/.." || exit 2

piece=1 pieces=1 limit=3600 again=no logs=.test-all/$(git rev-parse --short HEAD 2>/dev/null || echo none)
while getopts "p:t:l:f" option; do
    case $option in
        p) piece=${OPTARG%/*} pieces=${OPTARG#*/} ;;
        t) limit=$OPTARG ;;
        l) logs=$OPTARG ;;
        f) again=yes ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if ! [[ $piece =~ ^[1-9][0-9]*$ && $pieces =~ ^[1-9][0-9]*$ && $limit =~ ^[1-9][0-9]*$ ]] ||
    ((piece > pieces)); then
    echo "run_slow: needs -p K/N with K from 1 to N and -t SECONDS" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
if (($#)); then files=("$@"); else mapfile -t files < <(find tests -name 'test_*.py' | sort); fi
mkdir -p "$logs"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.test-all/cache}

passed=0 kept=0 failed=()
for i in "${!files[@]}"; do
    ((i % pieces == piece - 1)) || continue
    file=${files[i]} name=${files[i]//\//.}
    log=$logs/$name.log
    if [[ $again == no && -e $logs/$name.passed ]]; then
        kept=$((kept + 1))
        continue
    fi
    start=$SECONDS
    # 124: out of time; 5: the file has no slow tests.
    cpu=$({ time timeout --kill-after=30 "$limit" \
        "$python" -m pytest -n 0 -m slow "$file" >"$log" 2>&1; echo "$?"; } 2>&1)
    status=${cpu##*$'\n'} cpu=${cpu%%$'\n'*} spent=$((SECONDS - start))
    case $status in
        0 | 5)
            touch "$logs/$name.passed"
            passed=$((passed + 1)) verdict=passed ;;
        124 | 137)
            failed+=("$file (over $limit s, $log)") verdict="out of time" ;;
        *)
            failed+=("$file ($log)") verdict=FAILED ;;
    esac
    printf '%-12s %6d s, CPU %5.0f s  %s  %s\n' \
        "$verdict" "$spent" "$cpu" "$file" "$(tail -n 1 "$log")"
done

echo "piece $piece/$pieces: $passed passed, $kept passed before, ${#failed[@]} failed, $SECONDS s"
for file in "${failed[@]}"; do echo "  failed: $file"; done
((${#failed[@]} == 0))
