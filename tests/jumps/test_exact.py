"""Exact mathematics of Markov jump processes against independent numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumps.references import REFERENCE
from scipy.linalg import expm
from scipy.optimize import minimize

from numpyro_sde.jumps import bridges, forward_backward, generators, sparse, uniformisation
from numpyro_sde.jumps.generators import generator_matrix
from numpyro_sde.jumps.uniformisation import transition_matrices


@pytest.fixture(autouse=True)
def _float64(x64):
    pass


def ratchet(p):
    place = jnp.arange(3)
    on = jnp.exp(-p[0] * (place[None, :] - place[:, None]) / 2.0)
    eye = jnp.eye(3) * p[1]
    return generator_matrix(jnp.block([[on, eye], [eye, jnp.full((3, 3), p[2])]]))


def labels():
    ref = REFERENCE["mjp_dfr_noisy"]
    seen = np.array(ref["labels"])[:, None] == np.arange(6)
    return ref, jnp.array(ref["Q"]), np.diff(ref["t"]), jnp.log(0.9 * seen + 0.1 / 6)


def birth_death(birth, death, n):
    """Generator of a chain on counts: rates as functions of the count."""
    count = np.arange(n)
    up, down = birth(count).astype(float), death(count).astype(float)
    up[-1] = 0.0
    return generator_matrix(jnp.array(np.diag(up[:-1], 1) + np.diag(down[1:], -1)))


def test_functions_of_a_generator():
    ref, Q, _, _ = labels()
    np.testing.assert_allclose(ratchet(jnp.ones(3)), Q, atol=1e-14)
    law = generators.stationary_law(Q)
    np.testing.assert_allclose(law, ref["stationary"], atol=1e-12)
    rate = generators.entropy_production(Q)
    np.testing.assert_allclose(rate, ref["entropy_production_rate"], atol=1e-12)
    times = generators.mean_first_passage_times(Q, 0)
    np.testing.assert_allclose(times, ref["mfpt_to_0"], atol=1e-12)
    flux = law[:, None] * Q
    current = sum(flux[i, (i + 1) % 3] - flux[(i + 1) % 3, i] for i in range(3))
    np.testing.assert_allclose(current, ref["ring_current"], atol=1e-12)
    decay = np.sort(np.linalg.eigvals(np.array(Q)).real)[:-1]
    np.testing.assert_allclose(-1.0 / decay[::-1], ref["relaxation_times"], rtol=1e-10)


def test_functions_of_a_generator_where_states_cannot_be_reached():
    Q = generator_matrix(jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    assert np.all(np.isnan(generators.stationary_law(Q)))
    np.testing.assert_allclose(generators.mean_first_passage_times(Q, 0), [0.0, np.inf, np.inf])
    np.testing.assert_allclose(generators.mean_first_passage_times(Q, [2]), [1.5, 0.5, 0.0])
    assert np.isinf(generators.entropy_production(Q, jnp.ones(3) / 3))
    with pytest.raises(ValueError, match=r"targets must be states in 0\.\.2"):
        generators.mean_first_passage_times(Q, 3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_transition_matrices_are_matrix_exponentials(scale):
    gaps = np.array([0.0, 0.02, 0.7, 2.2])
    Q = scale * np.array(REFERENCE["mjp_dfr_noisy"]["Q"])
    P = transition_matrices(jnp.array(Q), gaps)
    np.testing.assert_allclose(P, [expm(Q * t) for t in gaps], rtol=1e-12, atol=2e-12)
    np.testing.assert_allclose(jnp.sum(P, axis=2), 1.0, atol=2e-12)


def test_transition_matrices_near_a_defective_generator():
    # A death chain of nearly equal rates: eigenvectors coincide in the limit.
    for eps in (1e-3, 1e-6, 0.0):
        rates = 1.0 + eps * np.arange(4)
        Q = generator_matrix(jnp.array(np.diag(rates, 1)))
        np.testing.assert_allclose(
            transition_matrices(Q, np.array([1.3]))[0], expm(np.array(Q) * 1.3), rtol=1e-13
        )


def test_too_high_rates_give_nan_not_a_number():
    Q = jnp.array([[-1.0, 1.0], [1.0, -1.0]])
    assert np.all(np.isnan(transition_matrices(1e9 * Q, np.array([1.0]))))
    assert np.all(np.isnan(transition_matrices(jnp.nan * Q, np.array([1.0]))))
    assert np.all(np.isnan(generator_matrix(jnp.array([[0.0, -1.0], [1.0, 0.0]]))))
    edges = (np.array([0, 1]), np.array([1, 0]), 1e6 * jnp.ones(2))
    assert np.all(np.isnan(sparse.propagate(*edges, jnp.array([1.0, 0.0]), 1.0)))


@pytest.mark.slow
def test_derivatives_of_transition_matrices():
    gaps = np.array([0.3, 9.0])  # the second is halved and squared

    def entry(p):
        return jnp.sum(transition_matrices(ratchet(p), gaps)[:, 0, 4] * jnp.array([1.0, 3.0]))

    def dense(p):
        Q = ratchet(p)
        return sum(w * jax.scipy.linalg.expm(Q * t)[0, 4] for t, w in ((0.3, 1.0), (9.0, 3.0)))

    p = jnp.array([1.0, 2.0, 0.5])
    np.testing.assert_allclose(jax.grad(entry)(p), jax.grad(dense)(p), rtol=1e-10)


def test_counts_seen_exactly():
    for name, birth, death in (
        ("birth_death", lambda r, n: r["birth"] * n, lambda r, n: r["death"] * n),
        (
            "immigration_death_exactly_observed",
            lambda r, n: np.full(n.shape, r["lam"]),
            lambda r, n: r["mu"] * n,
        ),
    ):
        ref = REFERENCE[name]
        Q = birth_death(lambda n: birth(ref, n), lambda n: death(ref, n), 120)  # noqa: B023
        P = transition_matrices(Q, np.diff(ref["t"]), num_terms=256)
        n = np.array(ref["n"])
        terms = np.log(P[np.arange(n.size - 1), n[:-1], n[1:]])
        np.testing.assert_allclose(terms.sum(), ref["exact"], atol=1e-8)


@pytest.mark.slow
def test_two_noisy_states():
    ref = REFERENCE["mjp_two_state"]
    log_emission = jax.scipy.stats.norm.logpdf(jnp.array(ref["y"])[:, None], jnp.arange(2), 0.5)

    def parts(log_rates):
        a, b = jnp.exp(log_rates)
        Q = generator_matrix(jnp.array([[0.0, a], [b, 0.0]]))
        return generators.stationary_law(Q), transition_matrices(Q, np.diff(ref["t"]))

    @jax.jit
    def value(log_rates):
        return forward_backward.log_likelihood(*parts(log_rates), log_emission)

    at = jnp.log(jnp.array([ref["a"], ref["b"]]))
    law, P = parts(at)
    got, slope = jax.value_and_grad(value)(at)
    np.testing.assert_allclose(got, ref["log_likelihood"], atol=1e-8)
    np.testing.assert_allclose(slope, ref["grad_log_rates"], atol=1e-8)
    passed = forward_backward.forward(law, P, log_emission)
    np.testing.assert_allclose(passed.filtered[:, 1], ref["filtered_p1"], atol=1e-8)
    np.testing.assert_allclose(passed.log_likelihood, ref["log_likelihood"], atol=1e-8)
    smoothed = forward_backward.smooth(law, P, log_emission)
    np.testing.assert_allclose(smoothed[:, 1], ref["smoothed_p1"], atol=1e-8)
    # Evidence and posterior moments under the prior N(0, 1) of both log rates, by the
    # trapezoidal rule, which is exact to rounding for integrands that vanish with all derivatives.
    nodes = np.linspace(-8.0, 8.0, 81)
    grid = jnp.array(np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2))
    prior = np.exp(-0.5 * np.sum(grid**2, axis=1)) / (2 * np.pi) * (nodes[1] - nodes[0]) ** 2
    mass = prior * np.exp(jax.vmap(value)(grid))
    np.testing.assert_allclose(np.log(mass.sum()), ref["log_evidence"], atol=1e-8)
    mean = mass @ grid / mass.sum()
    np.testing.assert_allclose(mean, ref["post_mean_log"], atol=1e-6)
    sd = np.sqrt(mass @ (grid - mean) ** 2 / mass.sum())
    np.testing.assert_allclose(sd, ref["post_sd_log"], atol=1e-6)


@pytest.mark.slow
def test_second_derivatives_of_the_likelihood():
    ref, _, gaps, log_emission = labels()

    def value(p):
        P = transition_matrices(ratchet(p), gaps)
        return forward_backward.log_likelihood(jnp.array(ref["stationary"]), P, log_emission)

    hessian = jax.jit(jax.hessian(value))(jnp.ones(3))
    step, slope = 1e-5, jax.jit(jax.grad(value))
    for i in range(3):
        move = step * np.eye(3)[i]
        numeric = (slope(1.0 + move) - slope(1.0 - move)) / (2 * step)
        np.testing.assert_allclose(hessian[i], numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_noisy_labels_with_expected_jumps_and_times():
    ref, Q, gaps, log_emission = labels()
    law = jnp.array(ref["stationary"])
    P = transition_matrices(Q, gaps)
    value = forward_backward.log_likelihood(law, P, log_emission)
    np.testing.assert_allclose(value, ref["log_likelihood"], atol=1e-8)
    stats = bridges.path_statistics(Q, law, gaps, log_emission)
    np.testing.assert_allclose(stats.jumps, ref["expected_jumps"], atol=1e-8)
    np.testing.assert_allclose(stats.dwell, ref["expected_dwell"], atol=1e-8)

    def of_rates(rates):
        P = transition_matrices(generator_matrix(rates), gaps)
        return forward_backward.log_likelihood(law, P, log_emission)

    slope = np.array(jax.grad(of_rates)(Q))
    possible = np.array(ref["grad_rates_init_fixed"]) != 0.0
    np.testing.assert_allclose(
        slope[possible], np.array(ref["grad_rates_init_fixed"])[possible], atol=1e-8
    )
    smoothed = forward_backward.smooth(law, P, log_emission)
    np.testing.assert_allclose(smoothed[0], ref["smoothed_first"], atol=1e-8)
    np.testing.assert_allclose(smoothed[20], ref["smoothed_mid"], atol=1e-8)


@pytest.mark.slow
def test_impossible_data():
    _, Q, gaps, log_emission = labels()
    law, P = jnp.ones(6) / 6, transition_matrices(Q, gaps)
    impossible = log_emission.at[5].set(-jnp.inf)
    value, slope = jax.value_and_grad(forward_backward.log_likelihood, 2)(law, P, impossible)
    assert value == -jnp.inf
    assert not np.any(np.isnan(slope[:5]))
    assert forward_backward.forward(law, P, impossible).log_likelihood == -jnp.inf
    # A state that cannot be is no obstacle: its emission counts for nothing.
    certain = jnp.where(jnp.arange(6) == 2, -jnp.inf, log_emission)
    slope = jax.grad(forward_backward.log_likelihood, 1)(law, P, certain)
    assert np.all(np.isfinite(slope))
    assert np.isnan(forward_backward.log_likelihood(law, P * jnp.nan, log_emission))


def test_long_series_do_not_underflow():
    Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
    log_emission = jnp.full((5001, 2), -50.0)
    P = transition_matrices(Q, np.full(1, 0.1))[jnp.zeros(5000, int)]
    value, slope = jax.value_and_grad(forward_backward.log_likelihood, 1)(
        jnp.array([0.75, 0.25]), P, log_emission
    )
    np.testing.assert_allclose(value, -50.0 * 5001, rtol=1e-12)
    assert np.all(np.isfinite(slope))


@pytest.mark.slow
def test_maximum_likelihood_of_counted_transitions():
    ref = REFERENCE["dfr_public"]
    for table, step, atol in (
        (ref, ref["dt"], 2e-5),
        (ref["subset_300x50"], 2 * ref["dt"], 2e-5),  # every second point
    ):
        counts = jnp.array(table["counts"])

        @jax.jit
        def value(log_p, counts=counts, step=step):
            P = transition_matrices(ratchet(jnp.exp(log_p)), np.array([step]))[0]
            return -jnp.sum(counts * jnp.log(P)) / jnp.sum(counts)

        fit = minimize(jax.value_and_grad(value), np.zeros(3), jac=True, tol=1e-13)
        np.testing.assert_allclose(np.exp(fit.x), table["mle_V_r_b"], atol=atol)
        total = float(jnp.sum(counts))
        np.testing.assert_allclose(-total * fit.fun, table["loglik_mle"], rtol=1e-9)
        np.testing.assert_allclose(-total * value(jnp.zeros(3)), table["loglik_true"], rtol=1e-12)


def sir_projection():
    """All states of an epidemic of 30 that starts with 3 infected, and the jumps among them."""
    states = [(s, i) for s in range(28) for i in range(31 - s)]
    place = {state: k for k, state in enumerate(states)}
    edges = [
        (place[s, i], place[s + ds, i + di], kind)
        for s, i in states
        for kind, (ds, di) in enumerate([(-1, 1), (0, -1)])
        if (s + ds, i + di) in place and i > 0
    ]
    return np.array(states), np.array(edges).T, place[27, 3]


def test_matrix_free_forward_pass_of_an_epidemic():
    ref = REFERENCE["sir_five_laws"]
    states, (source, target, kind), start = sir_projection()
    assert len(states) == ref["states"]
    y = np.array([np.nan, *ref["y"]])
    log_emission = jax.scipy.stats.norm.logpdf(jnp.array(y)[:, None], states[:, 1], 1.5)
    log_emission = jnp.where(jnp.isnan(log_emission), 0.0, log_emission)
    init = jnp.zeros(len(states)).at[start].set(1.0)

    @jax.jit
    def run(p):
        S, infected = states[source].T
        rates = jnp.where(kind == 0, p[0] * S * infected / 30, p[1] * infected)
        edges = sparse.Edges(source, target, rates, num_terms=96)
        passed = sparse.forward(init, edges, np.ones(8), log_emission)
        return passed.log_likelihood, passed

    p = jnp.array([ref["beta"], ref["gamma"]])
    (value, passed), slope = jax.value_and_grad(run, has_aux=True)(p)
    np.testing.assert_allclose(value, ref["exact"], atol=1e-8)
    np.testing.assert_allclose(passed.filtered[1:] @ states, ref["filtered_S_I"], atol=1e-8)
    for i in range(2):
        move = 1e-5 * np.eye(2)[i]
        numeric = (run(p + move)[0] - run(p - move)[0]) / 2e-5
        np.testing.assert_allclose(slope[i], numeric, rtol=1e-6)


@pytest.mark.slow
def test_a_batch_of_long_and_short_times_and_its_gradients():
    # A batch takes as many parts as its longest time asks for; the others must not.
    source, target = np.array([0, 1, 1, 2]), np.array([1, 0, 2, 0])
    start = jnp.array([0.2, 0.3, 0.5])
    weight = jnp.array([1.0, -2.0, 0.5])

    def by_edges(rates, t):
        moved = sparse.propagate(source, target, rates, start, t, num_terms=32)
        return jnp.sum(weight * moved)

    def by_matrix(rates, t):
        Q = generator_matrix(jnp.zeros((3, 3)).at[source, target].set(rates))
        return jnp.sum(weight * (start @ jax.scipy.linalg.expm(Q * t)))

    rates = jnp.array([[1.0, 2.0, 0.5, 3.0], [20.0, 9.0, 30.0, 4.0]])
    t = jnp.array([0.01, 2.0])
    for order in (lambda f: f, jax.grad, lambda f: jax.jacfwd(jax.grad(f))):
        got = jax.jit(jax.vmap(order(by_edges)))(rates, t)
        np.testing.assert_allclose(got, jax.vmap(order(by_matrix))(rates, t), atol=1e-10)


def test_matrix_free_equals_dense():
    ref, Q, gaps, log_emission = labels()
    source, target = np.nonzero(np.array(Q) > 0)
    edges = sparse.Edges(source, target, Q[source, target], num_terms=16)  # cuts long gaps
    law, P = jnp.array(ref["stationary"]), transition_matrices(Q, gaps)
    passed = sparse.forward(law, edges, gaps, log_emission)
    np.testing.assert_allclose(passed.log_likelihood, ref["log_likelihood"], atol=1e-8)
    np.testing.assert_allclose(
        sparse.smooth(passed, edges, gaps, log_emission),
        forward_backward.smooth(law, P, log_emission),
        atol=1e-10,
    )
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        sparse.draw_states(key, passed.filtered, edges, gaps),
        forward_backward.draw_states(key, passed.filtered, P),
    )


@pytest.mark.slow
def test_drawn_paths_have_the_expected_jumps_and_times():
    ref, Q, gaps, log_emission = labels()
    law, P, times = jnp.array(ref["stationary"]), transition_matrices(Q, gaps), jnp.array(ref["t"])
    filtered = forward_backward.forward(law, P, log_emission).filtered

    @jax.jit
    @jax.vmap
    def draw(key):
        key_states, key_jumps = jax.random.split(key)
        states = forward_backward.draw_states(key_states, filtered, P)
        return states, bridges.draw_jumps(key_jumps, Q, times, states, num_terms=32)

    num = 2000
    states, jumps = draw(jax.random.split(jax.random.key(1), num))
    smoothed = forward_backward.smooth(law, P, log_emission)
    shares = np.mean(np.array(states)[..., None] == np.arange(6), axis=0)
    error = np.sqrt(smoothed * (1 - smoothed) / num)
    assert np.all(np.abs(shares - smoothed) < 4.5 * error + 1e-3)
    trimmed = bridges.trim(jumps)
    grid_states = jax.vmap(bridges.states_at, (0, None))(trimmed, times)
    np.testing.assert_array_equal(grid_states, states)
    before, after = np.array(trimmed.states)[:, :-1], np.array(trimmed.states)[:, 1:]
    real = ~np.isnan(trimmed.times)
    assert np.all(before[real] != after[real])
    numbers = np.array(
        [
            [
                [np.sum(real & (before == i) & (after == j), axis=1) for j in range(6)]
                for i in range(6)
            ]
        ]
    )[0]
    error = numbers.std(-1) / np.sqrt(num)
    assert np.all(np.abs(numbers.mean(-1) - ref["expected_jumps"]) <= 4.0 * error)
    ends = np.nan_to_num(np.array(trimmed.times), nan=float(times[-1]))
    stamps = np.concatenate([np.zeros((num, 1)), ends, np.full((num, 1), float(times[-1]))], 1)
    lengths = np.diff(stamps, axis=1)
    dwell = np.array([np.sum(lengths * (trimmed.states == i), axis=1) for i in range(6)])
    error = dwell.std(1) / np.sqrt(num)
    assert np.all(np.abs(dwell.mean(1) - ref["expected_dwell"]) <= 4.0 * error)


def test_jumps_that_need_more_terms_are_nan():
    Q = jnp.array([[-40.0, 40.0], [40.0, -40.0]])
    jumps = bridges.draw_jumps(
        jax.random.key(0), Q, jnp.array([0.0, 1.0]), jnp.array([0, 1]), num_terms=32
    )
    assert np.all(np.isnan(jumps.times))
    assert uniformisation.terms_for(40.0) == 128


def test_float32():
    with jax.enable_x64(False):
        Q = jnp.array(REFERENCE["mjp_dfr_noisy"]["Q"], jnp.float32)
        P = transition_matrices(Q, np.array([0.5, 30.0]))
        assert P.dtype == jnp.float32
        dense = [expm(np.array(Q, float) * t) for t in (0.5, 30.0)]
        np.testing.assert_allclose(P, dense, rtol=2e-5)
