"""SnapshotLaw against closed forms: normal populations, growth, noise, ragged snapshots."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.testing import check_distribution

TIMES = np.array([0.0, 0.7, 1.5])


def ou(rate=1.2, mean=0.5, scale=0.6):
    return nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=mean, scale=scale)


def ou_moments(x0, t, rate=1.2, mean=0.5, scale=0.6):
    decay = np.exp(-rate * t)
    return mean + decay * (x0 - mean), scale**2 * (1.0 - decay**2) / (2.0 * rate)


def by_hand(starts, snapshots, times=TIMES, noise=0.0):
    """Mixture over starts, with SciPy."""
    total = []
    for k in range(1, len(times)):
        m, v = ou_moments(starts[None], times[k] - times[0])
        density = stats.norm.pdf(snapshots[k][:, None], m, np.sqrt(v + noise**2))
        total.append(np.log(density.mean(1)))
    return total


@pytest.fixture
def clouds():
    rng = np.random.default_rng(3)
    return rng.normal(1.0, 0.5, (3, 6))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transition", [None, "moments", nsde.schemes.LocalLinear()])
def test_mixture_over_cells(clouds, transition):
    law = nsde.SnapshotLaw(
        ou(), nsde.TimeGrid(TIMES, 0.02), clouds[0], transition=transition, noise_scale=0.2
    )
    terms = law.log_prob_pointwise(clouds)
    expected = by_hand(clouds[0], clouds, noise=0.2)
    np.testing.assert_array_equal(terms[0], 0.0)
    np.testing.assert_allclose(terms[1:], expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(law.log_prob(clouds), np.sum(expected), rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_normal_start_is_exact_and_split_starts_agree(clouds):
    init = dist.Normal(0.8, 0.7)
    whole = nsde.SnapshotLaw(ou(), TIMES, init, num_cells=6, noise_scale=0.1)
    split = nsde.SnapshotLaw(
        ou(), TIMES, init, num_cells=6, noise_scale=0.1, transition="moments", num_starts=256
    )
    expected = [stats.norm.logpdf(clouds[0], 0.8, np.sqrt(0.7**2 + 0.01))]
    for t in TIMES[1:]:
        m, v = ou_moments(0.8, t)
        sd = np.sqrt(v + np.exp(-2.4 * t) * 0.49 + 0.01)
        expected.append(stats.norm.logpdf(clouds[len(expected)], m, sd))
    np.testing.assert_allclose(whole.log_prob_pointwise(clouds), expected, atol=1e-10)
    near = np.array(expected) > -3.0  # 64 and 256 normal laws have other tails, 5 sd out
    np.testing.assert_allclose(
        split.log_prob_pointwise(clouds)[near], np.array(expected)[near], atol=5e-3
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_other_starts_and_other_transitions():
    # A square-root process from a gamma law: the exact transition is no normal law. The density at
    # each time by quadrature over the start.
    sde = nsde.processes.CoxIngersollRoss(rate=1.5, mean=1.0, scale=0.4)
    init = dist.Uniform(0.5, 1.5)
    y = np.array([[0.8, 1.1], [0.9, 1.3]])
    law = nsde.SnapshotLaw(sde, [0.0, 0.5], init, num_cells=2, num_starts=4000)
    nodes, mass = np.polynomial.legendre.leggauss(60)
    scheme = sde.exact_transition()
    grid = jnp.asarray(1.0 + 0.5 * nodes)
    density = jax.vmap(
        lambda x: jax.vmap(lambda y: scheme.log_density(sde, 0.0, 0.5, x, y))(jnp.asarray(y[1]))
    )(grid)
    expected = np.log(0.5 * mass @ np.exp(np.asarray(density)))
    terms = law.log_prob_pointwise(y)
    np.testing.assert_allclose(terms[0], 0.0, atol=1e-12)
    # 4,000 random points: standard error about sd(p) / p / 63 < 0.02 of the log density
    np.testing.assert_allclose(terms[1], expected, atol=4 * 0.02)
    draws = law.sample(jax.random.key(1), (2000,))[:, 1].ravel()
    np.testing.assert_allclose(draws.mean(), 1.0, atol=4 * draws.std() / np.sqrt(draws.size))


@pytest.mark.usefixtures("x64")
def test_growth_tilts_brownian_motion():
    # Girsanov: growth c x shifts the mean by c s^2 t^2 / 2. Cameron and Martin: -k^2 x^2 / 2 leaves
    # N(x / cosh kt, tanh(kt) / k) with mass exp(-k x^2 tanh(kt) / 2) / sqrt(cosh kt).
    sde = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
    starts, t, c, k = np.array([-0.5, 0.4]), 1.3, 0.7, 1.1
    grid = nsde.TimeGrid([0.0, t], 0.01)
    y = np.array([starts, [0.3, -0.2]])
    linear = nsde.SnapshotLaw(sde, grid, starts, growth=lambda t, x: c * x)
    weights = np.exp(c * starts * t)
    density = stats.norm.pdf(y[1][:, None], starts + c * t**2 / 2, np.sqrt(t))
    expected = np.log(density @ weights / weights.sum())
    np.testing.assert_allclose(linear.log_prob_pointwise(y)[1], expected, atol=1e-8)
    quadratic = nsde.SnapshotLaw(sde, grid, starts, growth=lambda t, x: -0.5 * k**2 * x**2)
    weights = np.exp(-0.5 * k * starts**2 * np.tanh(k * t))
    sd = np.sqrt(np.tanh(k * t) / k)
    density = stats.norm.pdf(y[1][:, None], starts / np.cosh(k * t), sd)
    expected = np.log(density @ weights / weights.sum())
    np.testing.assert_allclose(quadratic.log_prob_pointwise(y)[1], expected, atol=1e-7)
    constant = nsde.SnapshotLaw(sde, grid, starts, growth=lambda t, x: 0.3)
    plain = nsde.SnapshotLaw(sde, grid, starts)
    np.testing.assert_allclose(constant.log_prob(y), plain.log_prob(y), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_ragged_snapshots(clouds):
    ragged = nsde.snapshots.stack_snapshots([clouds[0, :4], clouds[1], clouds[2, :5]])
    assert ragged.shape == (3, 6)
    law = nsde.SnapshotLaw(ou(), TIMES, ragged[0], num_cells=[4, 6, 5])
    terms = law.log_prob_pointwise(ragged)
    expected = by_hand(clouds[0, :4], clouds)
    np.testing.assert_allclose(terms[1], expected[0], atol=1e-10)
    np.testing.assert_allclose(terms[2, :5], expected[1][:5], atol=1e-10)
    np.testing.assert_array_equal(terms[2, 5:], 0.0)
    drawn = law.sample(jax.random.key(0), (3,))
    assert (~np.isnan(drawn)).sum(-1).tolist() == [[4, 6, 5]] * 3
    assert np.all(law.support(drawn))
    gradient = jax.grad(lambda s: nsde.SnapshotLaw(ou(scale=s), TIMES, ragged[0]).log_prob(ragged))
    assert np.isfinite(gradient(0.6))


@pytest.mark.usefixtures("x64")
def test_particles_are_exact_where_the_guide_is(clouds):
    # On a linear equation every guided path has the weight p(y | x) itself.
    y = clouds[:, :3]
    grid = nsde.TimeGrid(TIMES, 0.4)
    exact = nsde.SnapshotLaw(ou(), grid, y[0])
    simulated = nsde.SnapshotLaw(ou(), grid, y[0], transition=nsde.snapshots.GuidedParticles(2))
    np.testing.assert_allclose(
        simulated.log_prob_pointwise(y), exact.log_prob_pointwise(y), atol=1e-8
    )


@pytest.mark.slow
def test_contract_of_a_distribution():
    def law(rate, scale):
        sde = nsde.SDE(
            lambda t, x, p: -p["rate"] * x**3,
            lambda t, x, p: p["scale"],
            params={"rate": rate, "scale": scale},
        )
        return nsde.SnapshotLaw(
            sde,
            nsde.TimeGrid([0.0, 0.2], 0.1),
            dist.Normal(jnp.zeros(2), 1.0).to_event(1),
            num_cells=2,
            num_starts=3,
        )

    check_distribution(
        law, jax.random.key(0), args=(jnp.array(1.0), jnp.array(0.5)), fields={"sde": 0}
    )


@pytest.mark.usefixtures("x64")
def test_plate_of_donors_is_the_sum_of_its_members(clouds):
    two = np.stack([clouds, clouds[:, ::-1] + 0.1])
    rates = jnp.array([0.8, 1.6])

    def model(y):
        with numpyro.plate("donor", 2):
            rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
            sde = ou(rate=rate)
            law = nsde.SnapshotLaw(sde, TIMES, dist.Normal(1.0, 0.5), num_cells=6)
            numpyro.sample("cells", law, obs=y)

    total, _ = log_density(model, (two,), {}, {"rate": rates})
    expected = dist.LogNormal(0.0, 1.0).log_prob(rates).sum()
    for r, y in zip(rates, two, strict=True):
        law = nsde.SnapshotLaw(ou(rate=r), TIMES, dist.Normal(1.0, 0.5), num_cells=6)
        expected = expected + law.log_prob(y)
    np.testing.assert_allclose(total, expected, rtol=1e-10)


def test_weights_are_a_bootstrap_of_the_start(clouds):
    weights = np.array([2.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    resampled = clouds[0, [0, 0, 2, 5]]
    weighted = nsde.SnapshotLaw(ou(), TIMES, clouds[0], weights=weights)
    repeated = nsde.SnapshotLaw(ou(), TIMES, resampled, num_cells=6)
    later = np.asarray(weighted.log_prob_pointwise(clouds))[1:]
    padded = np.full((1, 6), np.nan)
    padded[0, :4] = resampled
    other = np.concatenate([padded, clouds[1:]])
    np.testing.assert_allclose(later, repeated.log_prob_pointwise(other)[1:], rtol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": dist.Normal(0.0, 1.0)}, "num_cells must be given"),
        ({"times": [0.0, 1.0, 0.5]}, "strictly increasing"),
        ({"times": [0.0]}, "at least 2 snapshots"),
        ({"num_cells": [6, 6]}, "3 of them"),
        ({"num_cells": 5}, "holds 6 cells"),
        ({"noise_scale": -1.0}, "noise_scale must be positive"),
        ({"weights": np.ones(5)}, "weights must have shape"),
        ({"growth": lambda t, x: x, "transition": nsde.schemes.Euler()}, "growth"),
        (
            {
                "init": dist.MixtureSameFamily(
                    dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1.0)
                ),
                "num_cells": 6,
            },
            "no smooth map",
        ),
    ],
)
def test_errors_name_the_argument(clouds, arguments, message):
    arguments = {"times": TIMES, "init": clouds[0], **arguments}
    with pytest.raises(ValueError, match=message):
        nsde.SnapshotLaw(ou(), arguments.pop("times"), arguments.pop("init"), **arguments)


def test_data_that_do_not_fit_are_refused(clouds):
    law = nsde.SnapshotLaw(ou(), TIMES, clouds[0])
    with pytest.raises(ValueError, match="event shape"):
        law.log_prob(clouds[:, :5])
    with pytest.raises(ValueError, match="not that of init"):
        law.log_prob(clouds + 1.0)
    with pytest.raises(ValueError, match="missing in part"):
        nsde.SnapshotLaw(ou(), TIMES, np.array([[1.0, np.nan]]))
    noisy = ou().driven_by(nsde.noise.MarkovFBM(0.3))
    with pytest.raises(ValueError, match="Brownian motion"):
        nsde.SnapshotLaw(noisy, TIMES, clouds[0])


@pytest.mark.slow
def test_terms_reach_arviz(clouds):
    pytest.importorskip("arviz")

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        numpyro.sample("cells", nsde.SnapshotLaw(ou(rate=rate), TIMES, y[0]), obs=y)

    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=20, num_samples=20, progress_bar=False
    )
    mcmc.run(jax.random.key(0), clouds)
    terms = np.asarray(nsde.diagnostics.to_arviz(mcmc)["log_likelihood"]["cells"])
    assert terms.shape == (1, 20, 12)  # the first snapshot is given and no data
    rates = mcmc.get_samples()["rate"]
    law = nsde.SnapshotLaw(ou(rate=rates[3]), TIMES, clouds[0])
    np.testing.assert_allclose(terms[0, 3], np.ravel(law.log_prob_pointwise(clouds)[1:]), atol=1e-4)


@pytest.mark.slow
def test_engines_find_the_posterior_of_a_quadrature(clouds):
    from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    rng = np.random.default_rng(4)
    start = rng.normal(2.0, 0.3, 40)
    y = [start]
    for t in TIMES[1:]:
        m, v = ou_moments(start, t)
        y.append(m + np.sqrt(v) * rng.normal(size=40))
    y = np.stack(y)

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        numpyro.sample("cells", nsde.SnapshotLaw(ou(rate=rate), TIMES, y[0]), obs=y)

    grid = np.linspace(0.3, 4.0, 800)
    logs = [sum(np.sum(b) for b in by_hand_at(r, y)) for r in grid]
    logs = np.array(logs) + stats.lognorm.logpdf(grid, 0.5)
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    draws = np.asarray(mcmc.get_samples()["rate"])
    # At least 250 effective draws of 1,000.
    assert abs(draws.mean() - mean) < 4 * sd / np.sqrt(250)
    assert abs(draws.std() / sd - 1) < 4 / np.sqrt(2 * 250)
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(8))
    fit = svi.run(jax.random.key(1), 1500, y, progress_bar=False)
    rates = guide.sample_posterior(jax.random.key(2), fit.params, sample_shape=(4000,))["rate"]
    # A log-normal fit of a nearly log-normal posterior: a quarter of its standard deviation.
    assert abs(float(rates.mean()) - mean) < 0.25 * sd


def by_hand_at(rate, snapshots):
    total = []
    for k in (1, 2):
        m, v = ou_moments(snapshots[0][None], TIMES[k], rate=rate)
        total.append(np.log(stats.norm.pdf(snapshots[k][:, None], m, np.sqrt(v)).mean(1)))
    return total
