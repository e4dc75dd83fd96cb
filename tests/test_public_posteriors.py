"""Reference draws are written as posteriordb keeps them."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "us_treasury-stochastic_volatility"


@pytest.mark.slow
def test_a_posterior_is_written_in_the_databases_layout(tmp_path):
    script = ROOT / "benchmarks" / "public" / "make_reference.py"
    command = [sys.executable, script, NAME, "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    about = json.loads((tmp_path / "posteriors" / f"{NAME}.json").read_text())
    assert about["data_name"] == "us_treasury"
    assert about["model_name"] == "stochastic_volatility"
    folder = tmp_path / "reference_posteriors" / "draws"
    info = json.loads((folder / "info" / f"{NAME}.info.json").read_text())
    names = info["diagnostics"]["diagnostic_information"]["names"]
    assert names[:4] == ["rate", "mean", "scale", "v[1]"]
    assert len(names) == sum(about["dimensions"].values())
    assert not info["checks_made"]["ndraws_is_10k"]  # a quick run passes for nothing else
    with zipfile.ZipFile(folder / "draws" / f"{NAME}.json.zip") as archive:
        chains = json.loads(archive.read(f"{NAME}.json"))
    assert [len(chain["rate"]) for chain in chains] == [20, 20]
    assert list(chains[0]) == names
    with zipfile.ZipFile(tmp_path / "data" / "data" / "us_treasury.json.zip") as archive:
        data = json.loads(archive.read("us_treasury.json"))
    assert len(data["times"]) == len(data["change"])
    source = (tmp_path / "models" / "numpyro" / "stochastic_volatility.py").read_text()
    assert source.startswith("def stochastic_volatility(")
