"""What objects print: short, with values, also inside a trace and in notebooks."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import numpyro_sde as nsde


def drift(t, x, p):
    return -p["rate"] * x


def diffusion(t, x, p):
    return 0.5


def test_equations_print_their_parameters():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.25, mean=0.0, scale=0.5)
    assert repr(ou) == "OrnsteinUhlenbeck(mean=0, rate=1.25, scale=0.5)"
    plain = nsde.SDE(drift, diffusion, params={"rate": jnp.ones((3, 2))})
    assert repr(plain) == "SDE(drift=drift, diffusion=diffusion, rate=float32[3, 2])"
    rough = ou.driven_by(nsde.noise.MarkovFBM(0.3))
    assert "noise=MarkovFBM" in repr(rough)
    assert "<th>rate</th><td>1.25</td>" in ou._repr_html_()


def test_paths_print_grid_and_scheme():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=jnp.array([1.0, 2.0]), mean=0.0, scale=0.5)
    grid = nsde.TimeGrid([0.0, 1.0, 2.0], 0.5)
    text = repr(nsde.SDEPath(ou, grid, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler()))
    assert "rate=[1, 2]" in text
    assert "TimeGrid(3 observation times, 5 grid times, longest step 0.5)" in text
    assert "init=Normal" in text
    assert "scheme=Euler()" in text
    assert "batch=(2,)" in text


def test_inside_a_trace():
    seen = []

    @jax.jit
    def run(rate):
        ou = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=0.0, scale=0.5)
        seen.append(repr(nsde.SDEPath(ou, np.arange(3.0), 0.0)))
        return rate

    run(1.0)
    assert "rate=traced" in seen[0]
    assert len(seen[0]) < 300


def test_filters_print_what_is_not_default():
    assert repr(nsde.filters.Kalman()) == "Kalman()"
    assert repr(nsde.filters.UnscentedKalman(kappa=1.0)) == "UnscentedKalman(kappa=1)"
    keyed = repr(nsde.filters.Particle(50, proposal="bootstrap").with_key(jax.random.key(0)))
    assert keyed.startswith("Particle(num_particles=50")
    assert keyed.endswith("key=key)")
    assert "ootstrap" in keyed
    assert "\n" not in keyed


def test_results_print_themselves():
    pit = np.random.default_rng(0).uniform(size=50)
    found = nsde.diagnostics.Residuals({"y": pit}, {"y": np.arange(50.0)}, 100)
    assert repr(found) == str(found)
    assert repr(found).startswith("One-step residuals")


def test_print_shows_a_block_and_notebooks_a_table():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.25, mean=0.0, scale=0.5)
    assert str(ou).splitlines() == [
        "OrnsteinUhlenbeck",
        "  mean   0",
        "  rate   1.25",
        "  scale  0.5",
    ]
    grid = nsde.TimeGrid([0.0, 1.0, 2.0], 0.5)
    lines = str(nsde.SDEPath(ou, grid, dist.Normal(0.0, 1.0))).splitlines()
    assert lines[0] == "SDEPath"
    assert lines[1].split(maxsplit=1) == ["sde", repr(ou)]
    assert "<th>longest step</th><td>0.5</td>" in grid._repr_html_()
    pit = np.random.default_rng(0).uniform(size=50)
    residuals = nsde.diagnostics.Residuals({"y": pit}, {"y": np.arange(50.0)}, 100)
    for shown in (nsde.filters.Kalman(), residuals):
        assert shown._repr_html_().startswith("<pre>")
