"""Milstein's scheme: the noncentral chi-squared law of one step, its limits and refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.schemes import Euler, Milstein

H, X = 0.25, 1.3


def square_root_sde(scale):
    return nsde.SDE(lambda t, x: 0.5 * (1.0 - x), lambda t, x: scale * jnp.sqrt(x))


@pytest.mark.parametrize("slope", [0.8, -0.8])
def test_density_is_a_shifted_noncentral_chi_squared(slope, x64):
    """`(w + r + 1/(4r)) / r` is noncentral chi-squared with 1 degree and 1/(4 r^2); r < 0 too."""
    sde = nsde.SDE(lambda t, x: 0.3 * x, lambda t, x: slope * x + 0.2)
    scale, r = (slope * X + 0.2) * np.sqrt(H), 0.5 * slope * np.sqrt(H)
    mean = X + 0.3 * X * H
    z = np.array([-2.0, -0.7, 0.0, 1.5, 4.0])
    w = z + r * (z**2 - 1)
    got = jax.vmap(lambda s: Milstein().log_density(sde, 0.0, H, jnp.asarray(X), s))(
        mean + scale * w
    )
    law = stats.ncx2(1, 1 / (4 * r**2))
    want = law.logpdf((w + r + 1 / (4 * r)) / r) - np.log(np.abs(r * scale))
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_density_integrates_to_one_over_its_support(x64):
    """With a wide step, where both roots count; the edge's square-root singularity removed."""
    sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 1.5 * x)
    r = 0.5 * 1.5 * np.sqrt(H)
    edge = X + 1.5 * X * np.sqrt(H) * (-r - 1 / (4 * r))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    root = 8.0 * (nodes + 1) / 2  # x = edge + root^2
    log_p = jax.vmap(lambda s: Milstein().log_density(sde, 0.0, H, jnp.asarray(X), s))(
        edge + root**2
    )
    total = np.sum(weights * 4.0 * 2 * root * np.exp(np.asarray(log_p)))
    assert total == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-4])
def test_constant_diffusion_gives_euler(scale):
    """The right limit, in value and gradient, in float32: no 0/0 as the slope vanishes."""

    def log_density(s, scheme):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5 + s * x)
        return scheme.log_density(sde, 0.0, H, jnp.asarray(X), jnp.asarray(1.1))

    milstein = jax.jit(jax.value_and_grad(lambda s: log_density(s, Milstein())))
    got, slope = milstein(scale)
    euler = jax.jit(lambda s: log_density(s, Euler()))(scale)
    assert float(got) == pytest.approx(float(euler), abs=2e-4)
    e = 1e-2
    wide = [milstein(scale + d)[0] for d in (-e, e)]
    assert float(slope) == pytest.approx(float(wide[1] - wide[0]) / (2 * e), rel=1e-2)


def test_edge_of_the_support():
    """Zero density beyond the edge, NaN for NaN, no innovation to lead there, no NaN gradient."""
    sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 1.5 * x)
    r = 0.5 * 1.5 * np.sqrt(H)
    edge = X + 1.5 * X * np.sqrt(H) * (-r - 1 / (4 * r))

    def log_density(s):
        return Milstein().log_density(sde, 0.0, H, jnp.asarray(X), s)

    value, slope = jax.value_and_grad(log_density)(jnp.asarray(edge - 0.1))
    assert value == -jnp.inf
    assert slope == 0.0
    assert np.isfinite(log_density(jnp.asarray(edge + 1e-3)))
    assert np.isnan(log_density(jnp.nan))
    assert np.isnan(Milstein().invert(sde, 0.0, H, jnp.asarray(X), jnp.asarray(edge - 0.1)))


def test_two_innovations_for_one_state(x64):
    """`invert` gives the root that continues Euler's; the other one leads to the same state."""
    sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 1.5 * x)
    r = 0.5 * 1.5 * np.sqrt(H)
    x = jnp.asarray(X)
    z = jnp.asarray(-2.0)
    folded = -2.0 / (2 * r) - z
    ends = [Milstein().step(sde, 0.0, H, x, e) for e in (z, folded)]
    assert float(ends[0]) == pytest.approx(float(ends[1]), rel=1e-12)
    back = Milstein().invert(sde, 0.0, H, x, ends[0])
    assert float(back) == pytest.approx(max(float(z), float(folded)), rel=1e-12)


def test_several_noises_on_a_scalar_are_one(x64):
    both = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.stack([0.3 * x, 0.4 * x]))
    one = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5 * x)
    got, want = (Milstein().log_density(s, 0.0, H, jnp.asarray(X), 1.2) for s in (both, one))
    assert float(got) == pytest.approx(float(want), rel=1e-12)


def test_refusals():
    x0 = jnp.ones(2)
    shared = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.eye(2) * x)
    with pytest.raises(ValueError, match=r"independent noise .* shape \(2, 2\).*Levy"):
        nsde.SDEPath(shared, [0.0, 1.0], x0, scheme=Milstein())
    coupled = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.stack([x[0] * x[1], x[1]]))
    with pytest.raises(ValueError, match=r"diffusion\[0\] depends on x\[1\]"):
        nsde.SDEPath(coupled, [0.0, 1.0], x0, scheme=Milstein())
    batched = nsde.SDE(
        lambda t, x, p: -x,
        lambda t, x, p: p["s"] * x[::-1],
        params={"s": np.ones((3, 2))},
        event_dims={"s": 1},
    )
    with pytest.raises(ValueError, match=r"diffusion\[0\] depends on x\[1\]"):
        nsde.SDEPath(batched, [0.0, 1.0], x0, scheme=Milstein())


def test_coupled_noise_of_traced_parameters_is_not_a_number():
    """What cannot be refused beforehand gives NaN, never a wrong density."""

    @jax.jit
    def log_density(s):
        sde = nsde.SDE(
            lambda t, x, p: -x, lambda t, x, p: p * jnp.stack([x[0] * x[1], x[1]]), params=s
        )
        path = nsde.SDEPath(sde, [0.0, 1.0], jnp.ones(2), scheme=Milstein())
        return path.log_prob(jnp.ones((2, 2)))

    assert np.isnan(log_density(1.0))
