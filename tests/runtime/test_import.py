"""What slows the import down is imported when it is used."""

import os
import subprocess
import sys
from pathlib import Path

import numpyro_sde as nsde

SLOW = (
    "scipy.stats",
    "scipy.signal",
    "scipy.optimize",
    "pandas",
    "arviz",
    "matplotlib",
    "diffrax",
    "blackjax",
)


def test_slow_packages_are_imported_late():
    code = f"import sys, numpyro_sde; print([name for name in {SLOW} if name in sys.modules])"
    root = str(Path(nsde.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
