"""The demo and the other examples run from end to end, with tiny sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VOLATILITY = ["volatility_parameters.png", "volatility_paths.png"]
ENGINES = ["nuts", "particle_gibbs", "svi"]


def run_demo(output: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    demo = [sys.executable, ROOT / "examples" / "demo.py", "--quick", "--output", output]
    run = subprocess.run(
        [*demo, "--parts", *parts],
        capture_output=True,
        text=True,
        # What the demo sets for itself (the number of devices) must not come from the tests.
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.slow
def test_demo_compares_three_engines(tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    run = run_demo(tmp_path / "out", "3")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([*VOLATILITY, *(f"volatility_{name}.nc" for name in ENGINES)])
    for name in ENGINES:
        posterior = arviz.from_netcdf(tmp_path / "out" / f"volatility_{name}.nc")["posterior"]
        assert posterior["v"].shape[2:] == (557,)
    assert "Verdicts" in run.stdout


@pytest.mark.slow
def test_demo_fits_a_latent_level(tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    run = run_demo(tmp_path / "out", "1")
    names = ["nile_level.png", "nile_parameters.png"]
    results = ["nile_flow.nc", "nile_flow_integrated.nc", "nile_nuts.nc"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names + results)
    nuts = arviz.from_netcdf(tmp_path / "out" / "nile_nuts.nc")["posterior"]
    assert nuts["level"].dims == ("chain", "draw", "time")
    assert nuts["time"].values[[0, -1]].tolist() == [1871.0, 1970.0]
    assert "khat" in run.stdout


def test_demo_writes_pictures_and_results(tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    run = run_demo(tmp_path / "out", "2")
    pictures = ["rate_parameters.png", "rate_prediction.png"]
    results = ["rate_euler.nc", "rate_exact.nc"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(pictures + results)
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    for result in results:
        tree = arviz.from_netcdf(tmp_path / "out" / result)
        assert {"rate", "mean", "scale"} <= set(tree["posterior"].data_vars)
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


@pytest.mark.slow
def test_the_pendulum_writes_its_friction(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / "pendulum.py"
    command = [sys.executable, script, "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "friction inside its 90 % band" in run.stdout
    assert (tmp_path / "pendulum_friction.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "nile_minima",
            ["maximum likelihood: H 0.8315, log likelihood 236.52", "posterior: H 0.8"],
        ),
        ("treasury_yield", ["maximum likelihood: H 0.725, d 1.225", "posterior: H 0.7"]),
        ("rough_volatility", ["true H 0.15", "quasi likelihood: H 0.522"]),
    ],
)
def test_hurst_examples_print_their_estimates(
    name: str, expected: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / f"{name}.py"
    command = [sys.executable, script, "--draws", "20", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for line in expected:
        assert line in run.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("population", ["theophylline"]),
        ("leverage", ["leverage"]),
        ("neurons", ["neurons"]),
        ("hare_lynx", ["hare_lynx"]),
    ],
)
def test_examples_of_data_shapes_draw_their_picture(
    name: str, pictures: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    more = ["--data", "theophylline"] if name == "population" else []
    script = ROOT / "examples" / f"{name}.py"
    command = [sys.executable, script, "--quick", "--output", tmp_path, *more]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for picture in pictures:
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("building_heat", "el_nino", "flu_outbreak", "gene_expression", "ice_core"),
        *("interest_rates", "ion_channel", "myoblasts", "particle_tracks", "price_jumps"),
        *("turbulence_closure", "irregular_ratings", "spikes_lorenz", "weights_in_motion"),
        *("moment_matching", "moving_spot", "learned_closure"),
    ],
)
def test_examples_of_the_gallery_draw_their_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / f"{name}.py"
    command = [sys.executable, script, "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["lotka_volterra", "repressilator"])
def test_snapshots_are_judged_and_drawn(problem: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / "snapshots_lotka_volterra.py"
    command = [sys.executable, script, "--quick", "--output", tmp_path, "--problems", problem]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for row in ("refined", "Brownian", "fresh draws", f"{problem}: posterior"):
        assert row in run.stdout
    for over in ("state", "time"):
        picture = tmp_path / f"{problem}_{over}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
