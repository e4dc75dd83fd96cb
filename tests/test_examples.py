"""The demo and the other examples run from end to end, with tiny sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = ["nile_level.png", "nile_parameters.png", "rate_parameters.png", "rate_prediction.png"]
RESULTS = [
    "nile_flow.nc",
    "nile_flow_integrated.nc",
    "nile_nuts.nc",
    "rate_euler.nc",
    "rate_exact.nc",
]


def test_demo_writes_pictures_and_results(tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--quick", "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        # What the demo sets for itself (the number of devices) must not come from the tests.
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(PICTURES + RESULTS)
    for picture in PICTURES:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    for result in RESULTS:
        tree = arviz.from_netcdf(tmp_path / "out" / result)
        posterior = tree["posterior"]
        assert {"rate", "mean", "scale"} <= set(posterior.data_vars)
    nuts = arviz.from_netcdf(tmp_path / "out" / "nile_nuts.nc")["posterior"]
    assert nuts["level"].dims == ("chain", "draw", "time")
    assert nuts["time"].values[[0, -1]].tolist() == [1871.0, 1970.0]
    assert "khat" in run.stdout
    assert "-214.49 (published -214.49)" in run.stdout
    assert run.stdout.rstrip().endswith(str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bimodal_fast_law", "rough_potential", "triad"])
def test_multiscale_examples_write_their_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
