"""Underdamped Langevin: the law of its step in closed form, and the kernel on Gaussians."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from scipy.linalg import expm, solve_discrete_lyapunov

import numpyro_sde as nsde
from numpyro_sde.infer.langevin import stepper

SCALES = np.array([0.1, 1.0, 20.0])


def linear_map(solver, variance, step_size, friction):
    """The step on a normal potential is linear: its matrix and its factor of the noise."""
    if solver == "quicsort":
        pytest.importorskip("diffrax")
    move = stepper(solver, lambda x: x / variance, step_size, friction)

    def step(state, normals):
        x, v = move.step(state[:1], state[1:], normals[:, None])
        return jnp.concatenate([x, v])

    origin = jnp.zeros(2), jnp.zeros(move.num_normals)
    return [np.asarray(a) for a in jax.jacobian(step, (0, 1))(*origin)]


def stationary(solver, variance, step_size, friction=2.0):
    A, B = linear_map(solver, variance, step_size, friction)
    return solve_discrete_lyapunov(A, B @ B.T)


def test_ubu_is_free_motion_kick_free_motion(x64):
    """Free motion by the matrix exponential, its noise by that of Van Loan (1978)."""
    h, friction, variance = 0.3, 1.7, 0.6
    F, Q = np.array([[0.0, 1.0], [0.0, -friction]]), np.diag([0.0, 2.0 * friction])
    block = expm(np.block([[-F, Q], [np.zeros((2, 2)), F.T]]) * h / 2)
    U = block[2:, 2:].T
    cov = U @ block[:2, 2:]
    kick = np.array([[1.0, 0.0], [-h / variance, 1.0]])
    A, B = linear_map("ubu", variance, h, friction)
    np.testing.assert_allclose(A, U @ kick @ U, atol=1e-13)
    np.testing.assert_allclose(B @ B.T, U @ kick @ cov @ kick.T @ U.T + cov, atol=1e-13)


@pytest.mark.parametrize(
    ("solver", "order"), [("ubu", 2), pytest.param("quicsort", 3, marks=pytest.mark.slow)]
)
def test_bias_of_the_stationary_law_falls_with_the_order(solver, order, x64):
    """Error of the variance of a position, at least of the solver's order."""
    steps = 0.1 / 2.0 ** np.arange(3)
    errors = [abs(stationary(solver, 1.0, h)[0, 0] - 1.0) for h in steps]
    rates = np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert np.all(rates > order - 0.1)
    if solver == "ubu":  # the docstring's h^2 / 6
        assert errors[-1] == pytest.approx(steps[-1] ** 2 / 6, rel=1e-3)


@pytest.mark.parametrize("friction", [0.1, 2.0, 30.0])
def test_small_and_large_friction(friction, x64):
    cov = stationary("ubu", 1.0, 0.05, friction)
    np.testing.assert_allclose(cov, np.eye(2), atol=2e-2)


def potential(z):
    return 0.5 * jnp.sum((z["x"] / SCALES) ** 2)


def run(kernel, draws, warmup=500, seed=0, **options):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, progress_bar=False, **options)
    chains = options.get("num_chains", 1)
    start = {"x": jnp.zeros((chains, 3) if chains > 1 else 3)}
    mcmc.run(jax.random.key(seed), init_params=start, extra_fields=("num_grad", "scale"))
    return mcmc


@pytest.mark.parametrize("solver", ["ubu", pytest.param("quicsort", marks=pytest.mark.slow)])
def test_draws_have_the_law_of_the_steps(solver):
    """Variances within 4 Monte Carlo errors of the stationary one of the step in closed form."""
    if solver == "quicsort":
        pytest.importorskip("diffrax")
    kernel = nsde.infer.UnderdampedLangevin(potential_fn=potential, step_size=0.5, solver=solver)
    mcmc = run(kernel, 4000)
    x = np.asarray(mcmc.get_samples()["x"], np.float64)
    extra = mcmc.get_extra_fields()
    scale = np.asarray(extra["scale"][-1], np.float64)
    assert np.all(np.abs(np.log(scale / SCALES)) < 0.5)
    assert np.all(extra["num_grad"] == 8 * (1 if solver == "ubu" else 2) + 1)
    for j in range(3):
        wanted = scale[j] ** 2 * stationary(solver, (SCALES[j] / scale[j]) ** 2, 0.5)[0, 0]
        squares = x[:, j] ** 2
        error = squares.std() / np.sqrt(effective_sample_size(squares[None]))
        assert abs(squares.mean() - wanted) < 4 * error


def test_a_run_goes_on_where_it_stopped_also_after_pickling():
    kernel = nsde.infer.UnderdampedLangevin(potential_fn=potential)
    whole = run(kernel, 40, 20).get_samples()["x"]
    first = run(kernel, 20, 20)
    state, kernel = pickle.loads(pickle.dumps((first.last_state, kernel)))
    later = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
    later.post_warmup_state = state
    later.run(state.rng_key)
    both = jnp.concatenate([first.get_samples()["x"], later.get_samples()["x"]])
    np.testing.assert_allclose(both, whole, rtol=1e-4, atol=1e-5)


def test_chains_in_one_program_are_different_draws_of_one_law():
    kernel = nsde.infer.UnderdampedLangevin(potential_fn=potential)
    mcmc = run(kernel, 300, 200, num_chains=3, chain_method="vectorized")
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"]) / SCALES
    assert x.shape == (3, 300, 3)
    assert numpyro.diagnostics.split_gelman_rubin(x).max() < 1.1
    assert len(np.unique(x[:, -1, 0])) == 3


def test_a_step_that_diverges_is_told():
    def quartic(z):
        return jnp.sum(z["x"] ** 4)

    kernel = nsde.infer.UnderdampedLangevin(potential_fn=quartic, step_size=3.0)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params={"x": jnp.full(2, 5.0)})
    assert mcmc.get_extra_fields()["diverging"].any()
    assert jnp.all(jnp.isfinite(mcmc.get_samples()["x"]))


@pytest.mark.slow
def test_a_model_agrees_with_nuts():
    """A panel of returns to a mean: posterior means within 4 Monte Carlo errors of NUTS'."""
    y = np.random.default_rng(0).normal(1.0, 2.0, size=(8, 5))

    def model(y):
        centre = numpyro.sample("centre", dist.Normal(0.0, 5.0))
        spread = numpyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("group", 8):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        level = numpyro.deterministic("level", centre + spread * z)
        numpyro.sample("y", dist.Normal(level[:, None], 2.0).to_event(2), obs=y)

    def fit(kernel, seed):
        mcmc = MCMC(kernel, num_warmup=1000, num_samples=8000, progress_bar=False)
        mcmc.run(jax.random.key(seed), y)
        return mcmc.get_samples()

    nuts = fit(numpyro.infer.NUTS(model), 0)
    langevin = fit(nsde.infer.UnderdampedLangevin(model, step_size=0.2), 1)
    assert langevin["level"].shape == (8000, 8)
    for transform in (lambda d: d["centre"], lambda d: np.log(d["spread"]), lambda d: d["z"][:, 0]):
        a, b = (np.asarray(transform(d), np.float64) for d in (nuts, langevin))
        errors = [v.std() / np.sqrt(effective_sample_size(v[None])) for v in (a, b)]
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(*errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"friction": -1.0}, "friction"),
        ({"solver": "euler"}, "solver"),
        ({"num_steps": 0}, "num_steps"),
        ({"potential_fn": None}, "one of model and potential_fn"),
        ({"model": lambda: None}, "one of model and potential_fn"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        nsde.infer.UnderdampedLangevin(**{"potential_fn": potential, **options})
