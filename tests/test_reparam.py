"""Whitened and bridged paths: densities, posteriors against quadrature, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import numpyro_sde as nsde

A = np.array([[-1.0, 0.5], [0.2, -0.8]])
L = np.array([[0.5, 0.2], [0.1, 0.4]])


def _vector_model():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    sde = nsde.SDE(
        lambda t, x, p: A @ x,
        lambda t, x, p: p * L * (1.0 + 0.1 * x[0] ** 2),
        params=scale,
    )
    init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    return numpyro.sample("x", nsde.SDEPath(sde, np.linspace(0.0, 1.0, 6), init))


def _whiten(model):
    return handlers.reparam(model, config={"x": nsde.reparam.InnovationReparam()})


def test_innovations_have_the_density_of_the_path():
    """log p(z) = log p(x(z)) + log |dx/dz|, the Jacobian by autodiff."""
    with jax.enable_x64(True):
        white = _whiten(_vector_model)
        sites = handlers.trace(handlers.seed(white, jax.random.key(1))).get_trace()
        scale, x0, z = (sites[k]["value"] for k in ("scale", "x_init", "x_innov"))

        def to_path(flat):
            law = handlers.trace(
                handlers.seed(handlers.substitute(_vector_model, {"scale": scale}), 0)
            ).get_trace()["x"]["fn"]
            return law.forward(flat[:2], flat[2:].reshape(5, 2)).reshape(-1)

        flat = jnp.concatenate([x0, z.reshape(-1)])
        _, log_det = jnp.linalg.slogdet(jax.jacobian(to_path)(flat))
        values = {"scale": scale, "x": to_path(flat).reshape(6, 2)}
        centred, _ = log_density(_vector_model, (), {}, values)
        whitened, _ = log_density(white, (), {}, {"scale": scale, "x_init": x0, "x_innov": z})
        np.testing.assert_allclose(whitened, centred + log_det, rtol=1e-10)
        np.testing.assert_allclose(sites["x"]["value"], values["x"], rtol=1e-10)


def test_observe_finds_the_clock_of_a_whitened_path():
    times = np.array([0.0, 0.3, 1.0])

    def model():
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        # A second path of the same shape on another clock: the values must tell them apart.
        numpyro.sample("other", nsde.SDEPath(sde, times + 5.0, dist.Normal(0.0, 1.0)))
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
        return nsde.observe("y", x, lambda t, x: dist.Delta(t))

    for one in (model, _whiten(model)):
        np.testing.assert_allclose(handlers.seed(one, jax.random.key(0))(), times, rtol=1e-6)


def test_whitened_panel_under_a_plate_with_a_mask():
    times = np.cumsum(np.random.default_rng(0).uniform(0.1, 0.3, (3, 5)), axis=-1)
    keep = jnp.array([True, False, True])

    def model():
        with numpyro.plate("series", 3), handlers.mask(mask=keep):
            rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
            sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
            numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))

    sites = handlers.trace(handlers.seed(_whiten(model), jax.random.key(0))).get_trace()
    assert sites["x_init"]["value"].shape == (3,)
    assert sites["x_innov"]["value"].shape == (3, 4)
    assert sites["x"]["value"].shape == (3, 5)
    log_prob = sites["x_innov"]["fn"].log_prob(sites["x_innov"]["value"])
    assert log_prob.shape == (3,)
    assert log_prob[1] == 0.0


def test_fixed_start_has_no_site_for_it():
    def model():
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        return numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1], init=2.0))

    sites = handlers.trace(handlers.seed(_whiten(model), jax.random.key(0))).get_trace()
    assert list(sites) == ["x_innov", "x"]
    assert sites["x"]["value"][0] == 2.0


BRIDGE_GRID = nsde.TimeGrid([0.0, 1.0, 2.0, 3.5], max_step=0.25)
BRIDGE_DATA = np.array([1.0, 0.4, 0.7, 0.9])


def _ou_between(tail=0.0):
    """An OU path on a fine grid, `tail` longer than the times at which it is known."""
    times = [*BRIDGE_GRID.observation_times, *([3.5 + tail] if tail else [])]
    grid = nsde.TimeGrid(times, max_step=0.25)

    def model():
        log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 1.0))
        log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 0.5))
        sde = nsde.SDE(
            lambda t, x, p: -p["rate"] * x,
            lambda t, x, p: p["scale"],
            params={"rate": jnp.exp(log_rate), "scale": jnp.exp(log_scale)},
        )
        numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(0.0, 1.0)))

    return model


def _euler_marginal(log_scale, log_rate):
    """Density of the Euler OU path at the known times, intermediate states summed out."""
    rate, scale = np.exp(log_rate), np.exp(log_scale)
    dt, index = BRIDGE_GRID.dt, BRIDGE_GRID.index
    cov = np.zeros((dt.size + 1, dt.size + 1))
    cov[0, 0] = 1.0
    for k, h in enumerate(dt):
        f = 1.0 - rate * h
        cov[k + 1, : k + 1] = cov[: k + 1, k + 1] = f * cov[k, : k + 1]
        cov[k + 1, k + 1] = f**2 * cov[k, k] + scale**2 * h
    known = cov[np.ix_(index, index)]
    _, log_det = np.linalg.slogdet(known)
    quadratic = BRIDGE_DATA @ np.linalg.solve(known, BRIDGE_DATA)
    return -0.5 * (quadratic + log_det)


@pytest.fixture(scope="module")
def bridge_truth():
    """Posterior means and sds of (log_scale, log_rate) by quadrature."""
    s, r = np.linspace(-4.0, 3.0, 81), np.linspace(-2.5, 1.3, 81)
    log_post = np.array(
        [[_euler_marginal(a, b) - 0.5 * a**2 - 0.5 * (b / 0.5) ** 2 for b in r] for a in s]
    )
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    out = {}
    for name, grid, w in (("log_scale", s, weight.sum(1)), ("log_rate", r, weight.sum(0))):
        mean = w @ grid
        out[name] = mean, np.sqrt(w @ (grid - mean) ** 2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("tail", [0.0, 0.5])
def test_bridge_posterior_equals_quadrature(bridge_truth, tail):
    """NUTS on whitened bridges, seed 0: means within 4 standard errors of the exact marginal.

    The states between are summed out exactly in `bridge_truth`; states past the last known one
    (`tail`) must not change the posterior of the parameters.
    """
    model = _ou_between(tail)
    bridge = nsde.reparam.BridgeReparam(BRIDGE_DATA, at=BRIDGE_GRID.index)
    bridged = handlers.reparam(model, config={"x": bridge})
    mcmc = MCMC(NUTS(bridged), num_warmup=400, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples()
    np.testing.assert_allclose(
        draws["x"][:, BRIDGE_GRID.index], np.tile(BRIDGE_DATA, (1500, 1)), rtol=1e-6
    )
    for name, (mean, sd) in bridge_truth.items():
        chain = np.asarray(draws[name], dtype=np.float64)
        ess = float(numpyro.diagnostics.effective_sample_size(chain[None]))
        assert abs(chain.mean() - mean) < 4.0 * sd / np.sqrt(ess), name
        assert abs(chain.std() / sd - 1.0) < 4.0 * np.sqrt(0.5 / ess) * 1.5, name


def test_bridge_before_the_first_known_state():
    """With the first states unknown, the start is latent and the path hits the known points."""
    grid = nsde.TimeGrid([0.0, 1.0, 2.0], max_step=0.5)
    points = np.full((5, 2), np.nan)
    points[2], points[4] = [1.0, -1.0], [0.5, 0.0]

    def model():
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.array([[0.5, 0.0], [0.2, 0.4]]))
        init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        numpyro.sample("x", nsde.SDEPath(sde, grid, init))

    bridged = handlers.reparam(model, config={"x": nsde.reparam.BridgeReparam(points)})
    sites = handlers.trace(handlers.seed(bridged, jax.random.key(0))).get_trace()
    assert sites["x_init"]["value"].shape == (2,)
    assert sites["x_innov"]["value"].shape == (2, 2)
    np.testing.assert_allclose(sites["x"]["value"][jnp.array([2, 4])], points[[2, 4]], rtol=1e-6)
    assert np.isfinite(sites["x_bridge"]["fn"].log_factor)


@pytest.mark.parametrize("reparam", ["innovation", "bridge"])
@pytest.mark.parametrize("outside", [True, False])
def test_conditioning_on_a_reparametrised_path_raises(reparam, outside):
    config = {
        "x": nsde.reparam.InnovationReparam()
        if reparam == "innovation"
        else nsde.reparam.BridgeReparam(BRIDGE_DATA, at=BRIDGE_GRID.index)
    }
    data = {"x": jnp.zeros(15)}
    model = _ou_between()
    if outside:
        model = handlers.condition(handlers.reparam(model, config=config), data=data)
    else:
        model = handlers.reparam(handlers.condition(model, data=data), config=config)
    with pytest.raises(ValueError, match="site 'x' is conditioned on"):
        handlers.seed(model, 0)()


def test_a_site_that_is_no_path_is_refused():
    model = handlers.reparam(
        lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)),
        config={"x": nsde.reparam.InnovationReparam()},
    )
    with pytest.raises(TypeError, match="site 'x' is a Normal"):
        handlers.seed(model, 0)()


@pytest.mark.parametrize(
    ("points", "at", "message"),
    [
        (BRIDGE_DATA, [0, 2, 1, 3], "at must be increasing"),
        (BRIDGE_DATA[:3], BRIDGE_GRID.index, "3 points at 4 indices"),
        (BRIDGE_DATA, [0, 4, 8, 99], "up to 99"),
        (BRIDGE_DATA, None, "one entry for each of the 15 times"),
        (np.full(15, np.nan), None, "no point of site 'x' is known"),
    ],
)
def test_bad_bridge_points(points, at, message):
    def build():
        bridge = nsde.reparam.BridgeReparam(points, at=at)
        handlers.seed(handlers.reparam(_ou_between(), config={"x": bridge}), 0)()

    with pytest.raises(ValueError, match=message):
        build()


def test_bridge_needs_as_many_noises_as_states():
    def model():
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.array([[0.0], [1.0]]))
        init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], init))

    bridge = nsde.reparam.BridgeReparam(np.zeros((2, 2)), at=[0, 2])
    with pytest.raises(ValueError, match=r"\(1,\) noises for states of shape \(2,\)"):
        handlers.seed(handlers.reparam(model, config={"x": bridge}), 0)()
