"""Euler's step in logarithms: exact for geometric Brownian motion, a map, a density."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.schemes import LogEuler

T, H = 0.3, 0.1


def logistic(p):
    return nsde.SDE(lambda t, x, p: x * (p["a"] - x), lambda t, x, p: p["s"] * (0.5 + x), params=p)


def test_exact_for_geometric_brownian_motion(x64):
    sde = nsde.processes.GeometricBrownianMotion(drift=0.3, volatility=0.4)
    exact = sde.exact_transition()
    x, z = jnp.array(1.3), jnp.linspace(-3.0, 3.0, 7)
    for scheme in (LogEuler(), exact):
        assert scheme.keeps_positive
    ends = [jax.vmap(lambda z, s=s: s.step(sde, T, H, x, z))(z) for s in (LogEuler(), exact)]
    np.testing.assert_allclose(*ends, rtol=1e-12)
    log_p = [
        jax.vmap(lambda e, s=s: s.log_density(sde, T, H, x, e))(ends[0])
        for s in (LogEuler(), exact)
    ]
    np.testing.assert_allclose(*log_p, rtol=1e-12)


def test_map_inverse_and_density_agree_in_vectors(x64):
    """`log p(x') = log N(z) - log |det dx'/dz|`; what is not positive has no density."""
    sde, x, z = logistic({"a": 1.2, "s": 0.4}), jnp.array([0.6, 2.0]), jnp.array([0.9, -1.1])
    x_next = LogEuler().step(sde, T, H, x, z)
    jacobian = jax.jacfwd(lambda z: LogEuler().step(sde, T, H, x, z))(z)
    np.testing.assert_allclose(LogEuler().invert(sde, T, H, x, x_next), z, atol=1e-10)
    want = -0.5 * z @ z - np.log(2 * np.pi) - jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(LogEuler().log_density(sde, T, H, x, x_next), want, rtol=1e-10)
    assert LogEuler().log_density(sde, T, H, x, jnp.array([0.6, -0.1])) == -jnp.inf
    assert jnp.isnan(LogEuler().log_density(sde, T, H, -x, x))


def test_panels_and_gradients_in_float32():
    times = np.array([0.0, 0.1, 0.25])

    def total(a, path):
        sde = logistic({"a": a, "s": 0.4})
        law = nsde.SDEPath(sde, times, dist.LogNormal(jnp.zeros(2), 0.1), scheme=LogEuler())
        return law.log_prob(path)

    path = jnp.array([[1.0, 1.1, 0.9], [0.8, 0.5, 0.6]])
    a = jnp.array([1.0, 2.0])
    got = total(a, path)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, [_by_hand(a_i, x) for a_i, x in zip(a, path, strict=True)], rtol=1e-5
    )
    assert np.isfinite(jax.grad(lambda a: total(a, path).sum())(a)).all()


def _by_hand(a, x):
    """The same in NumPy: normal steps of log x."""
    a, x = float(a), np.asarray(x, float)
    y, h = np.log(x), np.diff([0.0, 0.1, 0.25])
    s = 0.4 * (0.5 + x[:-1]) / x[:-1]
    z = (np.diff(y) - (a - x[:-1] - 0.5 * s**2) * h) / (s * np.sqrt(h))
    steps = -0.5 * z**2 - np.log(s * np.sqrt(2 * np.pi * h)) - y[1:]
    start = -0.5 * (y[0] / 0.1) ** 2 - np.log(0.1 * np.sqrt(2 * np.pi)) - y[0]
    return start + steps.sum()


def test_shared_noises_are_refused():
    sde = nsde.SDE(lambda t, x: x, lambda t, x: jnp.outer(x, jnp.ones(2)))
    with pytest.raises(ValueError, match="share Brownian motions"):
        nsde.SDEPath(sde, [0.0, 1.0], jnp.ones(2), scheme=LogEuler())
