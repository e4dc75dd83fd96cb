"""Reaction networks under their laws, against exact and independent numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde import laws
from numpyro_sde.schemes.inversion import binomial, poisson

SIR = REFERENCE["sir_five_laws"]
Y = np.array([np.nan, *SIR["y"]])
TIMES = np.arange(9.0)


def sir(accumulate=()):
    return nsde.ReactionNetwork(
        [[1, 0], [1, 1]],
        [[0, 0], [2, 0]],
        jnp.array([SIR["beta"] / 30, SIR["gamma"]]),
        species=["S", "I"],
        reactions=["infection", "recovery"],
        accumulate=accumulate,
    )


def sir_path(law, net=None):
    return nsde.ReactionPath(sir() if net is None else net, TIMES, [27.0, 3.0], law=law)


def filtered(path, method):
    return nsde.filter_path(path, lambda t, x: dist.Normal(x[1], 1.5), Y, method=method)


def test_mass_action_counts_the_ways_to_choose():
    net = nsde.ReactionNetwork([[2, 1, 0]], [[0, 0, 1]], jnp.array([2.0, 0.5, 3.0]))
    np.testing.assert_allclose(net.counted_rates(jnp.array([4.0])), [12.0, 2.0, 3.0])
    np.testing.assert_allclose(net.counted_rates(jnp.array([1.0])), [0.0, 0.5, 3.0])
    np.testing.assert_array_equal(net.stoichiometry, [[-2, -1, 1]])
    plain = nsde.ReactionNetwork([[2, 1, 0]], [[0, 0, 1]], jnp.array([2.0, 0.5, 3.0]), counts=False)
    np.testing.assert_allclose(plain.propensities_at(jnp.array([4.0])), [32.0, 2.0, 3.0])


def test_linear_noise_with_restart_by_the_extended_kalman_filter(x64):
    result = filtered(sir_path(laws.LinearNoise(80)), nsde.filters.ExtendedKalman())
    np.testing.assert_allclose(result.log_likelihood, SIR["lna_restart"], atol=1e-7)


@pytest.mark.slow
def test_linear_noise_without_restart(x64):
    law = laws.LinearNoise(80, restart=False)
    for method in (nsde.filters.ExtendedKalman(), nsde.filters.Kalman()):
        result = filtered(sir_path(law), method)
        np.testing.assert_allclose(result.log_likelihood, SIR["lna_no_restart"], atol=1e-7)
    # Later clocks go on from the deterministic path at their first time.
    path = sir_path(law)
    late = path.replace(times=np.arange(3.0, 9.0))
    points = path.scheme.prepare(path.sde, path.times, path.dt)
    again = late.scheme.prepare(late.sde, late.times, late.dt)
    np.testing.assert_allclose(again, points[3:], rtol=1e-12)
    with pytest.raises(ValueError, match="earlier time"):
        late.scheme.prepare(path.sde, path.times - 1.0, path.dt)
    init = dist.Normal(jnp.ones((3, 2)), 1.0).to_event(1)
    with pytest.raises(ValueError, match="one start and one first time"):
        nsde.ReactionPath(sir(), TIMES, init, law=law)


def test_normal_closure_by_moment_matching(x64):
    result = filtered(sir_path(laws.MomentClosure(2, substeps=80)), nsde.filters.MomentMatching())
    np.testing.assert_allclose(result.log_likelihood, SIR["normal_closure_2"], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "reference", "error"),
    [
        (laws.Jump(), SIR["exact"], 0.0),
        (laws.EulerMultinomial(10), SIR["euler_binomial_dt_0_1"], 0.0),
        pytest.param(
            laws.Langevin(substeps=50),
            SIR["chemical_langevin_particles"]["loglik"],
            SIR["chemical_langevin_particles"]["se"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_particles_under_three_laws(x64, law, reference, error):
    path = sir_path(law)

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(1000, proposal="bootstrap", key=key)
        return filtered(path, method).log_likelihood

    values = np.array([run(jax.random.key(k)) for k in range(8)])
    top = values.max()
    mean = top + np.log(np.mean(np.exp(values - top)))
    spread = np.std(np.exp(values - top)) / np.mean(np.exp(values - top)) / np.sqrt(len(values))
    assert spread < 0.2
    assert abs(mean - reference) < 4.0 * np.hypot(spread, error)


@pytest.mark.slow
def test_auxiliary_particles_survive_a_look_ahead_that_is_far_off(x64):
    # The drift alone, over one step of a day, sends the susceptible below zero.
    path = sir_path(laws.EulerMultinomial(10))

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(1000, proposal="auxiliary", key=key)
        return filtered(path, method).log_likelihood

    values = np.array([run(jax.random.key(k)) for k in range(4)])
    error = np.std(values, ddof=1) / 2.0
    assert error < 0.2
    assert abs(values.mean() - SIR["euler_binomial_dt_0_1"]) < 4.0 * error + 0.05


def test_immigration_and_death_linear_noise(x64):
    ref = REFERENCE["immigration_death_exactly_observed"]
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([ref["lam"], ref["mu"]]))
    path = nsde.ReactionPath(net, np.array(ref["t"]), [5.0], law=laws.LinearNoise())
    value = path.log_prob(jnp.array(ref["n"], float)[:, None])
    np.testing.assert_allclose(value, ref["linear_noise"], atol=1e-7)


def test_immigration_and_death_linear_noise_with_noisy_data(x64):
    exact = REFERENCE["immigration_death_exactly_observed"]
    ref = REFERENCE["immigration_death_noisy"]
    lam, mu = exact["lam"], exact["mu"]
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([lam, mu]))
    init = dist.Normal(jnp.full(1, lam / mu), jnp.full(1, np.sqrt(lam / mu))).to_event(1)
    path = nsde.ReactionPath(net, np.array(exact["t"]), init, law=laws.LinearNoise())
    result = nsde.filter_path(
        path,
        lambda t, x: dist.Normal(x[0], ref["sd"]),
        np.array(ref["y"]),
        method=nsde.filters.ExtendedKalman(),
    )
    np.testing.assert_allclose(result.log_likelihood, ref["linear_noise_kalman"], atol=1e-7)


@pytest.mark.slow
def test_incidence_by_accumulators():
    net = sir(["infection"])
    assert net.state_names == ("S", "I", "flux of infection")
    for law in (laws.Jump(), laws.EulerMultinomial(4), laws.Langevin(substeps=4)):
        x = np.array(sir_path(law, net).sample(jax.random.key(0), (20,)))
        np.testing.assert_allclose(net.of(x, "infection")[:, 0], 0.0)
        np.testing.assert_allclose(-np.diff(x[..., 0]), x[:, 1:, 2], atol=1e-4)
    # Of the linear noise approximation: the flux is what the susceptibles lost.
    mean, factor = nsde.schemes.LinearNoise().moments(net, 0.0, 1.0, jnp.array([27.0, 3.0, 9.0]))
    np.testing.assert_allclose(27.0 - mean[0], mean[2], rtol=1e-4)
    cov = factor @ factor.T
    np.testing.assert_allclose(cov[0, 2], -cov[2, 2], rtol=1e-3)
    np.testing.assert_allclose(net.of(jnp.arange(3.0), "I"), 1.0)
    with pytest.raises(ValueError, match=r"accumulate=\['recovery'\]"):
        net.of(jnp.arange(3.0), "recovery")
    with pytest.raises(ValueError, match="would accumulate the flux of infection without end"):
        nsde.SDEPath(net, TIMES, jnp.array([27.0, 3.0, 0.0]), scheme=nsde.schemes.Euler())


def test_jump_laws_of_known_marginals(x64):
    # Linear death: binomial; immigration and death from nothing: Poisson.
    num = 4000
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([3.0, 0.5]))
    empty = nsde.ReactionPath(net, [0.0, 2.0], [0.0], law=laws.Jump())
    x = np.array(empty.sample(jax.random.key(0), (num,)))[:, 1, 0]
    mean = 6.0 * (1 - np.exp(-1.0))
    assert abs(x.mean() - mean) < 4.0 * np.sqrt(mean / num)
    assert abs(x.var() - mean) < 4.0 * np.sqrt((mean + 2 * mean**2) / num)
    death = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
    for law in (laws.Jump(), laws.EulerMultinomial(7)):  # thinning is exact for any step
        x = np.array(
            nsde.ReactionPath(death, [0.0, 2.0], [40.0], law=law).sample(jax.random.key(1), (num,))
        )[:, 1, 0]
        counts = np.bincount(x.astype(int), minlength=41)
        expected = num * stats.binom.pmf(np.arange(41), 40, np.exp(-1.0))
        error = np.sqrt(expected * (1 - expected / num))
        assert np.all(np.abs(counts - expected) <= 4.5 * error + 1.0)


@pytest.mark.slow
def test_competing_exits_and_gamma_noise(x64):
    ref = REFERENCE["euler_multinomial"]
    value = nsde.jumps.exit_log_pmf(ref["counts"], ref["n"], ref["rates"], ref["dt"])
    np.testing.assert_allclose(value, ref["log_pmf"], atol=1e-8)
    noise = ref["gamma_noise"]
    pmf = functools.partial(
        nsde.jumps.noisy_exit_log_pmf,
        number=ref["n"],
        hazard=noise["rate"],
        dt=ref["dt"],
        noise=np.sqrt(noise["sigma2"]),
    )
    known = [pmf(k) for k in (0, 1, 3, 8)]
    np.testing.assert_allclose(known, noise["log_pmf_k_0_1_3_8"], atol=1e-8)
    # The step draws from these laws.
    two = nsde.ReactionNetwork([[1, 1]], [[0, 0]], jnp.array(ref["rates"]), accumulate=[0, 1])
    num = 20_000
    path = nsde.ReactionPath(two, [0.0, ref["dt"]], [20.0], law=laws.EulerMultinomial())
    x = np.array(path.sample(jax.random.key(0), (num,)))[:, 1]
    share = np.mean((x[:, 1] == 3) & (x[:, 2] == 2))
    truth = np.exp(ref["log_pmf"])
    assert abs(share - truth) < 4.0 * np.sqrt(truth * (1 - truth) / num)
    one = nsde.ReactionNetwork([[1]], [[0]], jnp.array([noise["rate"]]), reactions=["out"])
    law = laws.EulerMultinomial(noise={"out": float(np.sqrt(noise["sigma2"]))})
    x = np.array(
        nsde.ReactionPath(one, [0.0, ref["dt"]], [20.0], law=law).sample(jax.random.key(0), (num,))
    )[:, 1, 0]
    for k, log_p in zip((0, 1, 3, 8), known, strict=True):
        truth = np.exp(log_p)
        assert abs(np.mean(20 - x == k) - truth) < 4.0 * np.sqrt(truth * (1 - truth) / num)


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (20, 0.5), (760, 0.08), (50, 0.999)])
def test_binomial_numbers_by_inversion(x64, n, p):
    u = (np.arange(50_000) + 0.5) / 50_000
    k = np.array(jax.jit(jax.vmap(lambda u: binomial(u, float(n), p)))(u)).astype(int)
    shares = np.bincount(k, minlength=n + 1) / u.size
    np.testing.assert_allclose(shares, stats.binom.pmf(np.arange(n + 1), n, p), atol=4e-5)


def test_poisson_numbers_by_inversion(x64):
    u = (np.arange(50_000) + 0.5) / 50_000
    for mean in (0.1, 2.5, 300.0):
        k = np.array(jax.jit(jax.vmap(lambda u: poisson(u, mean)))(u)).astype(int)  # noqa: B023
        shares = np.bincount(k) / u.size
        np.testing.assert_allclose(
            shares, stats.poisson.pmf(np.arange(shares.size), mean), atol=4e-5
        )
    assert binomial(0.3, 0.0, 0.5) == 0 == poisson(0.3, 0.0)
    assert binomial(0.3, 7.0, 1.0) == 7
    assert np.isnan(binomial(0.3, jnp.nan, 0.5))


def model(law, y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    net = nsde.ReactionNetwork(
        [[1, 0], [1, 1]], [[0, 0], [2, 0]], jnp.stack([rate / 30, jnp.asarray(0.6)])
    )
    x = numpyro.sample("x", nsde.ReactionPath(net, TIMES, [27.0, 3.0], law=law))
    nsde.observe("y", x, lambda t, x: dist.Normal(x[1], 1.5), obs=y)


@pytest.mark.parametrize(
    ("law", "method", "message"),
    [
        (laws.Jump(), nsde.filters.ExtendedKalman(), "Gaussian transition"),
        (laws.Jump(), nsde.filters.Particle(10, proposal="guided"), "proposal='bootstrap'"),
        (laws.Jump(), nsde.filters.EnsembleKalman(), "proposal='bootstrap'"),
        (laws.Jump(), nsde.filters.MomentMatching(), "uses no scheme"),
        (laws.Jump(), nsde.filters.Kalman(), "Kalman"),
        (laws.EulerMultinomial(2), nsde.filters.UnscentedKalman(), "Gaussian transition"),
        (laws.MomentClosure(), nsde.filters.Particle(10, proposal="guided"), "innovations"),
        (laws.MomentClosure(), nsde.filters.ExtendedKalman(), "Gaussian transition"),
        (laws.MomentClosure(), nsde.filters.Kalman(), "Kalman"),
    ],
)
def test_engines_refuse_laws_that_they_cannot_treat(law, method, message):
    marginal = nsde.handlers.marginalize(model, method=method)
    with pytest.raises((ValueError, TypeError), match=message):
        numpyro.infer.util.log_density(marginal, (law, Y), {}, {"rate": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "method"),
    [
        (laws.LinearNoise(), nsde.filters.ExtendedKalman()),
        (laws.MomentClosure(), nsde.filters.MomentMatching()),
        (laws.Langevin(), nsde.filters.MomentMatching()),
    ],
)
def test_laws_that_are_integrated_out_have_a_gradient_and_predict(law, method):
    marginal = nsde.handlers.marginalize(model, method=method)

    @jax.jit
    def value(rate):
        return numpyro.infer.util.log_density(marginal, (law, Y), {}, {"rate": rate})[0]

    slope = jax.grad(value)(1.8)
    numeric = (value(1.82) - value(1.78)) / 0.04
    np.testing.assert_allclose(slope, numeric, rtol=0.02, atol=0.02)
    drawn = numpyro.infer.Predictive(marginal, num_samples=3)(jax.random.key(0), law)
    assert drawn["y"].shape == (3, 9)
    assert np.all(np.isfinite(drawn["y"]))


@pytest.mark.parametrize("law", [laws.Jump(), laws.EulerMultinomial(2)])
@pytest.mark.parametrize(
    "reparam", [nsde.reparam.InnovationReparam(), nsde.reparam.GuidedReparam()]
)
def test_reparametrisations_refuse_steps_that_are_not_smooth(law, reparam):
    white = numpyro.handlers.reparam(model, config={"x": reparam})
    with pytest.raises(ValueError, match="smooth maps of their innovations"):
        numpyro.handlers.trace(numpyro.handlers.seed(white, 0)).get_trace(law, Y)


def test_a_latent_path_of_counts_has_no_density():
    with pytest.raises(TypeError, match="no transition density"):
        numpyro.infer.util.log_density(
            model, (laws.Jump(), Y), {}, {"rate": 1.0, "x": jnp.ones((9, 2))}
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nsde.ReactionNetwork([[1]], [[0, 1]], jnp.ones(1)), "shape of reactants"),
        (lambda: nsde.ReactionNetwork([[-1]], [[0]], jnp.ones(1)), "reactants must not be neg"),
        (lambda: nsde.ReactionNetwork([[1.5]], [[0]], jnp.ones(1)), "whole numbers"),
        (lambda: nsde.ReactionNetwork([[1]], [[0]], -jnp.ones(1)), "finite and not negative"),
        (lambda: nsde.ReactionNetwork([[1]], [[0]], jnp.ones(2)), "one constant for each"),
        (lambda: nsde.ReactionNetwork([[1]], [[0]], jnp.ones(1), accumulate=["x"]), "no reaction"),
        (lambda: nsde.ReactionNetwork([[1]], [[0]], jnp.ones(1), species=["a", "b"]), "1 diff"),
        (lambda: sir_path(laws.Jump(), nsde.ReactionNetwork([[1]], [[0]], jnp.ones(1))), "shape"),
        (lambda: nsde.ReactionPath(sir(), TIMES, [26.5, 3.0], law=laws.Jump()), "whole numbers"),
        (
            lambda: nsde.ReactionPath(
                sir(), TIMES, dist.Normal(jnp.ones(2)).to_event(1), law=laws.Jump()
            ),
            "continuous Independent",
        ),
        (
            lambda: nsde.ReactionPath(
                nsde.ReactionNetwork([[2]], [[0]], jnp.ones(1)),
                TIMES,
                [4.0],
                law=laws.EulerMultinomial(),
            ),
            "uses up 2 individuals",
        ),
        (
            lambda: sir_path(laws.EulerMultinomial(noise={"cure": 0.1})),
            "no reaction 'cure'",
        ),
        (lambda: laws.MomentClosure(3), "order must be 2"),
        (
            lambda: sir_path(laws.MomentClosure(), sir(["infection"])),
            "no accumulators",
        ),
        (
            lambda: nsde.SDEPath(
                nsde.processes.DoubleWell(1.0, 1.0, 1.0),
                TIMES,
                0.0,
                scheme=nsde.schemes.Gillespie(),
            ),
            "reaction network",
        ),
    ],
)
def test_wrong_networks_and_laws(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_plates_of_networks():
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([[3.0, 0.5], [6.0, 0.5]]))
    path = nsde.ReactionPath(net, [0.0, 40.0, 80.0], [0.0], law=laws.Jump())
    assert path.batch_shape == (2,)
    x = path.sample(jax.random.key(0), (400,))
    assert x.shape == (400, 2, 3, 1)
    mean = np.array(x[:, :, 1:]).mean((0, 2, 3))
    assert np.all(np.abs(mean - [6.0, 12.0]) < 4.0 * np.sqrt(np.array([6.0, 12.0]) / 800))


def test_chemical_langevin_of_immigration_and_death_is_a_square_root_process(x64):
    # dN = (lam - mu N) dt + sqrt(lam + mu N) dW: N + lam / mu is a CIR process, whose law is exact.
    ref = REFERENCE["immigration_death_exactly_observed"]
    lam, mu = ref["lam"], ref["mu"]
    cir = nsde.processes.CoxIngersollRoss(mu, 2.0 * lam / mu, np.sqrt(mu))
    shifted = jnp.array(ref["n"], float) + lam / mu
    path = nsde.SDEPath(cir, np.array(ref["t"]), float(shifted[0]))
    np.testing.assert_allclose(path.log_prob(shifted), ref["chemical_langevin"], atol=1e-8)
    # The network's own drift and noise are those of that process.
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([lam, mu]))
    x = jnp.array([7.0])
    np.testing.assert_allclose(net.ito_drift_at(0.0, x), cir.drift_at(0.0, x + lam / mu))
    columns = net.diffusion_columns_at(0.0, x)
    np.testing.assert_allclose(jnp.sum(columns**2), lam + mu * 7.0)
