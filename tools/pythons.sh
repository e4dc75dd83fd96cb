# Sourced: interpreters that can make an environment.

# Those of the names given; a name alone does not tell, since a version manager's shim may start none.
usable_pythons() {
    local python
    for python in "$@"; do
        if "$python" -c "import ensurepip, venv" > /dev/null 2>&1; then
            echo "$python"
        else
            echo "skipped: $python is not installed, or has no venv" >&2
        fi
    done
}

# What to call an environment of it: `python3.12`, wherever it is and whatever it is called.
name_of_python() {
    "$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'
}
