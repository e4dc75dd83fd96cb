"""Particles of jump-diffusions: guided to the jumps, and conditioned on a path."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import numpyro_sde as nsde


@pytest.mark.slow
def test_guided_particles_jump_where_the_data_ask_for_it(x64):
    # Rare large jumps, precise data: the model's own steps hardly ever propose the right one.
    sde = nsde.SDE(
        lambda t, x: -0.3 * x,
        lambda t, x: 0.2,
        jumps=nsde.CompoundPoisson(0.1, dist.Normal(0.0, 2.0), max_per_step=4),
    )
    times = nsde.TimeGrid(np.arange(9.0), 0.5)
    y = np.array([0.0, 0.1, -0.1, 3.0, 2.2, 1.7, -1.5, -1.0, np.nan])

    def seen():
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 0.3)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.05), obs=y, at=times.index)

    def at(proposal, num):
        @jax.jit
        def run(key):
            method = nsde.filters.Particle(num, proposal=proposal, key=key)
            marginal = nsde.handlers.marginalize(seen, method=method)
            return numpyro.infer.util.log_density(marginal, (), {}, {})[0]

        return np.array([run(jax.random.key(k)) for k in range(16)])

    # The exact value by quadrature of the mixture, two steps between data.
    grid = np.linspace(-8.0, 8.0, 1281)
    width = grid[1] - grid[0]
    mean, var, n = 0.85 * grid, 0.04 * 0.5, np.arange(5)
    weights = stats.poisson.pmf(n, 0.05)
    weights = weights / weights.sum()
    step = sum(
        w * stats.norm.pdf(grid[None, :], mean[:, None], np.sqrt(var + 4.0 * k))
        for k, w in zip(n, weights, strict=True)
    )
    f, exact = stats.norm.pdf(grid, 0.0, 0.3), 0.0
    for k, value in enumerate(y):
        if k:
            f = f @ step * width @ step * width
        if np.isfinite(value):
            f = f * stats.norm.pdf(value, grid, 0.05)
            exact, f = exact + np.log(f.sum() * width), f / (f.sum() * width)
    guided, own = at("guided", 200), at("bootstrap", 2000)
    likelihood = np.exp(guided - exact)
    error = likelihood.std(ddof=1) / 4.0
    assert error < 0.1
    assert abs(likelihood.mean() - 1.0) < 4.0 * error
    assert guided.std() < 0.2 * own.std()


RARE = nsde.CompoundPoisson(0.3, dist.Normal(0.0, 2.0), max_per_step=6)
SEEN = np.array([0.1, -0.1, 3.0, 2.2, -1.5])


def rare():
    """Rare large jumps, precise data at each time of the grid."""
    sde = nsde.SDE(lambda t, x: -0.3 * x, lambda t, x: 0.4, jumps=RARE)
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(5.0), dist.Normal(0.0, 0.3)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=SEEN)


def exact_paths(num):
    """Paths given the data, by filtering forward on a grid of states and sampling backward."""
    grid = np.linspace(-4.0, 6.0, 2001)
    n = np.arange(7)
    weights = stats.poisson.pmf(n, 0.3)
    spread = np.sqrt(0.16 + 4.0 * n)
    step = sum(
        w * stats.norm.pdf(grid[None, :], 0.7 * grid[:, None], s)
        for w, s in zip(weights / weights.sum(), spread, strict=True)
    )
    beliefs = [stats.norm.pdf(grid, 0.0, 0.3) * stats.norm.pdf(SEEN[0], grid, 0.2)]
    for y in SEEN[1:]:
        f = beliefs[-1] @ step * stats.norm.pdf(y, grid, 0.2)
        beliefs.append(f / f.sum())
    rng, paths = np.random.default_rng(0), np.zeros((num, 5), int)
    for k in reversed(range(5)):
        f = beliefs[k] if k == 4 else beliefs[k] * step[:, paths[:, k + 1]].T
        cdf = np.cumsum(np.broadcast_to(f, (num, grid.size)), axis=1)
        u = rng.random((num, 1)) * cdf[:, -1:]
        paths[:, k] = np.minimum((cdf < u).sum(1), grid.size - 1)
    return grid[paths]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proposal", "renewal"),
    [
        ("auto", "backward"),
        pytest.param("guided", "ancestor", marks=pytest.mark.slow),
        pytest.param("guided", "none", marks=pytest.mark.slow),
        pytest.param("bootstrap", "backward", marks=pytest.mark.slow),
    ],
)
def test_conditional_particles_keep_the_law_of_a_path_that_jumps(x64, proposal, renewal):
    kernel = nsde.infer.ConditionalSMC(
        rare, num_particles=5, proposal=proposal, renewal=renewal, ess_threshold=1.0
    )
    num = 3000
    before = exact_paths(num)

    def sweep(x, key):
        state = nsde.infer.ConditionalSMCState({"x": x}, {}, {}, key)
        state = kernel.sample(state, (), {})
        return state.z["x"], state.renewed["x"]

    keys = jax.random.split(jax.random.key(1), num)
    after, renewed = map(np.array, jax.jit(jax.vmap(sweep))(jnp.array(before), keys))
    for found, known in ((after, before), (after**2, before**2)):
        apart = found - known  # of dependent draws: their own error
        error = np.maximum(apart.std(0) / np.sqrt(num), 1e-12)
        assert np.all(np.abs(apart.mean(0)) < 4.0 * error)
    if proposal != "bootstrap":
        assert renewed.mean() > 0.6
    if proposal == "auto":
        model = nsde.state_space_model(
            nsde.SDEPath(nsde.SDE(lambda t, x: -x, lambda t, x: 0.4, jumps=RARE), [0.0, 1.0], 0.0),
            lambda t, x: dist.Normal(x, 0.2),
            np.zeros(2),
        )
        assert type(kernel._setting(model).proposal).__name__ == "GuidedJumps"


@pytest.mark.slow
def test_conditional_particles_of_jumps_name_what_they_cannot_do():
    def finer():
        sde = nsde.SDE(lambda t, x: -0.3 * x, lambda t, x: 0.4, jumps=RARE)
        grid = nsde.TimeGrid(np.arange(5.0), 0.5)
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(0.0, 0.3)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=SEEN, at=grid.index)

    def start(**options):
        kernel = nsde.infer.ConditionalSMC(finer, num_particles=4, **options)
        return kernel.init(jax.random.key(0), 0, {"x": jnp.zeros(9)}, (), {})

    with pytest.raises(ValueError, match="Give renewal='none'"):
        start()
    assert start(renewal="none").z["x"].shape == (9,)
    with pytest.raises(ValueError, match="smooth maps"):
        start(proposal="defensive", renewal="none")
