"""Particle Gibbs and PMMH against NUTS with the path integrated out exactly."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.gibbs import Gibbs

import numpyro_sde as nsde
from numpyro_sde.filters import Kalman, Particle
from numpyro_sde.handlers import marginalize
from numpyro_sde.infer import PMMH, ConditionalSMC, ParticleGibbs

GRID = nsde.TimeGrid(np.arange(12.0) * 0.5, 0.26)
Y = np.random.default_rng(0).normal(size=12)
Y[4] = np.nan


def model(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
    path = nsde.SDEPath(sde, GRID, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y, at=GRID.index)


def run(kernel, warmup, draws, seed=0, fields=()):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(seed), Y, extra_fields=fields)
    return mcmc


@pytest.fixture(scope="module")
def reference():
    return run(NUTS(marginalize(model, method=Kalman())), 300, 3000).get_samples()


@pytest.fixture(scope="module")
def gibbs():
    kernel = ParticleGibbs(model, num_particles=8)
    fields = (kernel.PATH_RENEWED, kernel.INNER_ACCEPTANCE)
    return run(kernel, 200, 1500, 1, fields), kernel


@pytest.fixture(scope="module")
def pmmh():
    kernel = PMMH(model)
    return run(kernel, 500, 6000, 2), kernel


def agree(draws, others):
    """Means and log sds of the log parameters within 4 Monte Carlo errors."""
    for name in ("rate", "scale"):
        a, b = (np.log(np.asarray(d[name], np.float64)) for d in (draws, others))
        sizes = [float(effective_sample_size(v[None])) for v in (a, b)]
        assert min(sizes) > 80, (name, sizes)
        error = np.sqrt(sum(v.var() / n for v, n in zip((a, b), sizes, strict=True)))
        assert abs(a.mean() - b.mean()) < 4 * error, name
        # Relative error of a standard deviation: 1 / sqrt(2 n), doubled for heavier tails.
        spread = 2 * np.sqrt(sum(0.5 / n for n in sizes))
        assert abs(np.log(a.std() / b.std())) < 4 * spread, name


@pytest.mark.slow
def test_particle_gibbs_agrees(gibbs, reference):
    mcmc, kernel = gibbs
    agree(mcmc.get_samples(), reference)
    fields = mcmc.get_extra_fields()
    renewed = np.asarray(fields[kernel.PATH_RENEWED]["x"]).mean(0)
    assert renewed.shape == (GRID.times.size,)
    assert renewed.min() > 0.5
    assert 0.5 < float(np.mean(fields[kernel.INNER_ACCEPTANCE])) < 1.0
    assert "path renewed" in kernel.get_diagnostics_str(mcmc.last_state)


@pytest.mark.slow
def test_particle_gibbs_paths_have_the_posterior(gibbs, reference):
    mcmc, _ = gibbs
    paths = np.asarray(mcmc.get_samples()["x"])
    thinned = {name: value[::10] for name, value in reference.items()}
    exact = np.asarray(
        nsde.smooth(model, thinned, Y, method=Kalman(), rng_key=jax.random.key(3))["x"]
    )
    for k in (0, 5, GRID.times.size - 1):
        size = float(effective_sample_size(paths[None, :, k]))
        error = np.sqrt(paths[:, k].var() / size + exact[:, k].var() / len(exact))
        assert abs(paths[:, k].mean() - exact[:, k].mean()) < 4 * error


@pytest.mark.slow
def test_pmmh_agrees(pmmh, reference):
    mcmc, kernel = pmmh
    agree(mcmc.get_samples(), reference)
    # The model is linear: the guided filter's likelihood is exact, whatever its size.
    assert kernel.num_particles == 4
    assert kernel.log_likelihood_sd < 1e-3
    assert 0.1 < float(mcmc.last_state.mean_accept_prob) < 0.4


@pytest.mark.slow
def test_runs_go_on_and_states_pickle(pmmh, gibbs):
    for mcmc, kernel in (pmmh, gibbs):
        before = mcmc.get_samples()["rate"]
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(mcmc.last_state.rng_key, Y, extra_fields=tuple(mcmc.get_extra_fields()))
        after = mcmc.get_samples()["rate"]
        assert after.shape == before.shape
        assert not np.allclose(before[:20], after[:20])
        state = pickle.loads(pickle.dumps(jax.tree.map(_plain, mcmc.last_state)))
        assert jax.tree.structure(state) == jax.tree.structure(mcmc.last_state)
        assert type(pickle.loads(pickle.dumps(kernel))) is type(kernel)


@pytest.mark.slow
def test_pickled_kernels_run(pmmh, gibbs):
    for _, kernel in (pmmh, gibbs):
        again = run(pickle.loads(pickle.dumps(kernel)), 10, 5)
        assert np.all(np.isfinite(again.get_samples()["rate"]))


def _plain(leaf):
    """A leaf that pickles: typed keys as their data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        lambda: PMMH(model, proposal="bootstrap"),
        lambda: PMMH(model, 30, proposal="bootstrap", correlation=0.8),
        lambda: ParticleGibbs(model, 16, proposal="bootstrap", resampling="killing"),
        lambda: ParticleGibbs(model, 40, proposal="bootstrap", renewal="none"),
        lambda: Gibbs([(ConditionalSMC(model, num_particles=4), ["x"]), (NUTS(model), None)]),
    ],
    ids=["bootstrap", "correlated", "killing", "ancestral", "by hand"],
)
def test_other_settings_agree(kernel, reference):
    made = kernel()
    draws = 20_000 if isinstance(made, PMMH) else 8000
    agree(run(made, 1000, draws, 4).get_samples(), reference)


@pytest.mark.slow
def test_several_chains_of_one_kernel():
    for kernel in (PMMH(model, 8), ParticleGibbs(model, 8)):
        mcmc = MCMC(
            kernel,
            num_warmup=200,
            num_samples=500,
            num_chains=2,
            progress_bar=False,
            chain_method="sequential",
        )
        mcmc.run(jax.random.key(0), Y)
        draws = mcmc.get_samples(group_by_chain=True)["rate"]
        assert draws.shape == (2, 500)
        assert not np.allclose(draws[0], draws[1])


@pytest.mark.slow
def test_series_in_a_plate_have_random_numbers_of_their_own():
    y = np.stack([Y, Y[::-1]])

    def panel(y=None):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("series", 2):
            sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
            path = nsde.SDEPath(
                sde, GRID, dist.StudentT(5.0, 0.0, 1.0), scheme=nsde.schemes.Euler()
            )
            x = numpyro.sample("x", path)
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y, at=GRID.index)

    fits = []
    for kernel, draws in ((ParticleGibbs(panel, 16), 8000), (PMMH(panel), 20_000)):
        mcmc = MCMC(kernel, num_warmup=1000, num_samples=draws, progress_bar=False)
        mcmc.run(jax.random.key(5), y)
        fits.append(mcmc.get_samples())
    assert fits[0]["x"].shape == (8000, 2, GRID.times.size)
    agree(*fits)


@pytest.mark.slow
def test_a_particle_filter_is_refused_under_nuts():
    marginal = marginalize(model, method=Particle(2, proposal="bootstrap"))
    with pytest.raises(TypeError, match=r"PMMH.*ParticleGibbs"):
        run(NUTS(marginal), 5, 5)


@pytest.mark.slow
def test_a_particle_filter_is_refused_under_svi():
    marginal = marginalize(model, method=Particle(2, proposal="bootstrap"))
    svi = SVI(marginal, AutoNormal(marginal), numpyro.optim.Adam(0.01), Trace_ELBO())
    with pytest.raises(TypeError, match="ParticleGibbs"):
        svi.run(jax.random.key(0), 2, Y, progress_bar=False)


def test_what_kernels_refuse():
    with pytest.raises(ValueError, match="num_particles must be at least 2, got 1"):
        ConditionalSMC(model, num_particles=1)
    with pytest.raises(TypeError, match="hand over the model inside"):
        PMMH(marginalize(model, method=Kalman()))
    with pytest.raises(ValueError, match="correlation must be in"):
        PMMH(model, correlation=1.0)
    with pytest.raises(TypeError, match="list of names"):
        ConditionalSMC(model, "x")
    white = numpyro.handlers.reparam(model, config={"x": nsde.reparam.InnovationReparam()})
    with pytest.raises(ValueError, match="no latent SDEPath site"):
        run(ParticleGibbs(white, 4), 2, 2)

    def used_elsewhere(y=None):
        x = numpyro.sample(
            "x",
            nsde.SDEPath(
                nsde.processes.BrownianMotion(0.0, 1.0), [0.0, 1.0], dist.Normal(0.0, 1.0)
            ),
        )
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        nsde.observe("y", x, lambda t, x, p: dist.Normal(x + p, 0.5), params=shift, obs=y)
        numpyro.sample("z", dist.Normal(x[-1], 1.0), obs=0.3)

    block = ConditionalSMC(used_elsewhere, num_particles=4)
    with pytest.raises(ValueError, match=r"'x' in \['z'\]"):
        MCMC(
            Gibbs([(block, ["x"]), (NUTS(used_elsewhere), None)]),
            num_warmup=2,
            num_samples=2,
            progress_bar=False,
        ).run(jax.random.key(0), np.array([0.1, 0.4]))


@pytest.mark.slow
def test_degenerate_noise_is_refused():
    def hypoelliptic(y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        sde = nsde.processes.FitzHughNagumo(epsilon=0.1, gamma=1.5, beta=0.8, scale=scale)
        path = nsde.SDEPath(
            sde, [0.0, 0.05, 0.1], jnp.array([-0.8, -0.5]), scheme=nsde.schemes.Euler()
        )
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.1), obs=y)

    with pytest.raises(ValueError, match="GuidedReparam"):
        MCMC(ParticleGibbs(hypoelliptic, 4), num_warmup=2, num_samples=2, progress_bar=False).run(
            jax.random.key(0), np.array([np.nan, np.nan, -0.8])
        )
