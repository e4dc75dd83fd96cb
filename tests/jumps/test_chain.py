"""The Markov jump process as a user writes it: rates, edges, parameters and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumps.references import REFERENCE
from scipy.linalg import expm

import numpyro_sde as nsde


@pytest.mark.slow
def test_rates_by_matrix_by_edges_and_by_function_agree(x64):
    rates = np.array([[0.0, 1.0, 0.5], [2.0, 0.0, 0.0], [0.0, 0.3, 0.0]])
    source, target = np.nonzero(rates)
    edges = list(zip(source.tolist(), target.tolist(), strict=True))
    by_matrix = nsde.MarkovJumpProcess(rates, 3)
    by_edges = nsde.MarkovJumpProcess(rates[source, target], 3, edges=edges)
    by_function = nsde.MarkovJumpProcess(
        lambda p: p["scale"] * jnp.array(rates), 3, params={"scale": 1.0}
    )
    full = rates - np.diag(rates.sum(1))
    for chain in (by_matrix, by_edges, by_function, nsde.MarkovJumpProcess(full, 3)):
        np.testing.assert_allclose(chain.generator, full)
        np.testing.assert_allclose(chain.transition_matrix(0.7), expm(0.7 * full), atol=1e-12)
        assert not chain.is_reducible()
    assert by_matrix.transition_matrix(jnp.ones((2, 4))).shape == (2, 4, 3, 3)


def test_known_values(x64):
    ref = REFERENCE["mjp_dfr_noisy"]
    chain = nsde.MarkovJumpProcess(np.array(ref["Q"]), 6)
    np.testing.assert_allclose(chain.stationary_law(), ref["stationary"], atol=1e-12)
    np.testing.assert_allclose(
        chain.entropy_production(), ref["entropy_production_rate"], atol=1e-12
    )
    np.testing.assert_allclose(chain.mean_first_passage_times(0), ref["mfpt_to_0"], atol=1e-12)


def test_many_states_go_along_the_edges(x64):
    n = 80
    edges = [(i, i + 1) for i in range(n - 1)] + [(i + 1, i) for i in range(n - 1)]
    chain = nsde.MarkovJumpProcess(np.r_[np.full(n - 1, 2.0), np.ones(n - 1)], n, edges=edges)
    assert chain.matrix_free
    assert chain.num_terms > n  # any state may follow any other
    P = chain.transition_matrix(0.5)
    np.testing.assert_allclose(P, expm(0.5 * np.array(chain.generator)), atol=1e-12)
    assert np.all(np.array(P)[0, : n - 40] > 0.0)  # far fewer jumps than states, never zero


def test_batched_parameters_map():
    chain = nsde.MarkovJumpProcess(
        lambda p: jnp.stack([p["a"], p["b"]]),
        2,
        edges=[(0, 1), (1, 0)],
        params={"a": jnp.ones(5), "b": jnp.ones((3, 1))},
    )
    assert chain.batch_shape == (3, 5)
    assert nsde.MarkovJumpProcess(jnp.ones((4, 2, 2)), 2).batch_shape == (4,)


def test_traced_rates_that_are_none_give_nan():
    def law(rate):
        return nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [rate, 0.0]]), 2).stationary_law()

    assert np.all(np.isnan(jax.jit(law)(-1.0)))
    assert np.all(np.isnan(jax.jit(law)(0.0)))  # reducible
    np.testing.assert_allclose(jax.jit(law)(3.0), [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0, -1.0], [1.0, 0.0]], 2), ValueError, "finite and not negative, got -1"),
        (([[0.0, np.inf], [1.0, 0.0]], 2), ValueError, "finite and not negative, got inf"),
        ((np.ones((3, 2)), 2), ValueError, r"shape \(2, 2\)"),
        ((np.ones(2), 2), ValueError, r"shape \(2, 2\).*got \(2,\)"),
        ((np.ones((2, 2)), None), TypeError, "num_states must be a whole number"),
        ((np.ones((2, 2)), 0), ValueError, "num_states must be at least 1"),
        ((lambda p: p, 2), TypeError, "params was not given"),
        ((np.zeros((2001, 2001)), 2001), ValueError, "needs edges="),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nsde.MarkovJumpProcess(*arguments)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 0)], "join different states"),
        ([(0, 2)], r"states in 0\.\.1"),
        ([(0, 1), (0, 1)], "distinct"),
        ([0, 1], "pairs"),
    ],
)
def test_wrong_edges(edges, message):
    with pytest.raises(ValueError, match=message):
        nsde.MarkovJumpProcess(np.ones(len(edges)), 2, edges=edges)


def test_rates_of_the_wrong_number_of_edges():
    with pytest.raises(ValueError, match="one rate for each edge"):
        nsde.MarkovJumpProcess(np.ones(3), 2, edges=[(0, 1), (1, 0)])
