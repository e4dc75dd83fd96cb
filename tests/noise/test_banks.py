"""The bank seen through increments: its filter, and their likelihood in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import toeplitz

from numpyro_sde.noise import MarkovFBM
from numpyro_sde.noise.banks import increment_log_densities, innovations_form, log_likelihood


def test_likelihood_in_blocks_is_the_dense_one(x64):
    """Two blocks and a rest, two noises: value, and gradient `-cov^-1 d` in the increments."""
    length = 103
    d = np.random.default_rng(1).normal(size=(length, 2))
    bank, steps = MarkovFBM(0.8, 4).on_grid(np.arange(length + 1.0), np.ones(length))
    decay, loading, variance, gain, _ = (np.asarray(a)[0] for a in steps)
    start = np.asarray(bank.start)
    lag = np.arange(1, length)[:, None]
    later = (decay ** (lag - 1)) @ (loading * (decay * (start @ loading) + gain))
    cov = toeplitz(np.append(loading @ start @ loading + variance, later))
    solved = np.linalg.solve(cov, d)
    constant = 2 * (np.linalg.slogdet(cov)[1] + length * np.log(2 * np.pi))
    density = jax.jit(jax.value_and_grad(lambda d: log_likelihood(steps, bank.start, d)))
    value, slope = density(jnp.asarray(d))
    assert float(value) == pytest.approx(-0.5 * ((d * solved).sum() + constant), rel=1e-12)
    np.testing.assert_allclose(slope, -solved, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hurst", "length", "fit"),
    [
        (0.2, 131, {}),  # four blocks and a rest
        (0.5, 40, {}),  # one block
        (0.8, 663, {}),  # a number of blocks that is no power of two
        (0.2, 150, {"kind": 2, "fit": "strong"}),  # rates so large that a step forgets all
    ],
)
def test_likelihood_in_blocks_is_the_filters(hurst, length, fit, x64):
    """Its gradients too, in both modes."""
    d = jnp.asarray(np.random.default_rng(0).normal(size=(length, 2)))

    def bank_of(h):
        bank, steps = MarkovFBM(h, 5, **fit).on_grid(np.arange(length + 1.0), np.ones(length))
        return steps, bank.start

    def in_blocks(h, d):
        return log_likelihood(*bank_of(h), d)

    def by_filter(h, d):
        return increment_log_densities(innovations_form(*bank_of(h), length), d).sum()

    value, slopes = jax.jit(jax.value_and_grad(in_blocks, (0, 1)))(hurst, d)
    expected, expected_slopes = jax.jit(jax.value_and_grad(by_filter, (0, 1)))(hurst, d)
    assert float(value) == pytest.approx(float(expected), rel=1e-11)
    assert float(slopes[0]) == pytest.approx(float(expected_slopes[0]), rel=1e-9)
    np.testing.assert_allclose(slopes[1], expected_slopes[1], rtol=1e-9, atol=1e-9)
    forward = jax.jit(lambda h: jax.jvp(lambda h: in_blocks(h, d), (h,), (1.0,))[1])(hurst)
    assert float(forward) == pytest.approx(float(slopes[0]), rel=1e-9)


@pytest.mark.slow
def test_likelihood_in_blocks_in_float32_and_batches():
    """Value to 1e-5, gradient in H to 1e-3 of float64, for a batch of indices.

    Not at 1/2 itself, where all but the white term vanish and rounding decides what is kept.
    """
    d = np.random.default_rng(0).normal(size=(1000, 1))

    def density(h, d):
        bank, steps = MarkovFBM(h).on_grid(np.arange(1001.0), np.ones(1000))
        return log_likelihood(steps, bank.start, d)

    def run():
        batch = jax.vmap(jax.value_and_grad(density), (0, None))
        return jax.jit(batch)(jnp.array([0.1, 0.6, 0.9]), jnp.asarray(d))

    single = run()
    with jax.enable_x64(True):
        double = run()
    np.testing.assert_allclose(single[0], double[0], rtol=1e-5)
    np.testing.assert_allclose(single[1], double[1], rtol=1e-3)


@pytest.mark.parametrize("strong", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recursion_without_matrices_is_that_of_the_covariance(strong, x64):
    fit = {"fit": "strong"} if strong else {}
    for hurst in (0.05, 0.5, 0.9) if not strong else (0.1, 0.4, 0.6):
        bank, steps = MarkovFBM(hurst, **fit).on_grid(np.arange(301.0), np.ones(300))
        for quick, full in zip(
            innovations_form(steps, bank.start, 300, True),
            innovations_form(steps, bank.start, 300),
            strict=True,
        ):
            np.testing.assert_allclose(quick, full, rtol=1e-9, atol=1e-11)
