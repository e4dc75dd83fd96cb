"""Gradient of the marginal log likelihood of linear SDEs: the linear engine and its peers.

Run with `pytest benchmarks/bench_linear.py -m '' --benchmark-only -s`. For each case the table
gives the median CPU time of one compiled gradient (value and all derivatives), its ratio to
ours, and the CPU time of tracing and compiling. All alternatives are timed in turns within one
test, on the same data, in float64, and must agree on the value and on the derivatives.

Baselines: a scalar `lax.scan` written by hand for the case d = 1 (with and without
`jax.checkpoint` on the step and packing into vectors: the fastest counts);
the usual matrix `lax.scan` with LAPACK calls; cuthbert's Kalman filter where it is installed
(it works on square-root factors throughout, as our form "sqrt" does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_sde.linear.discretize import transitions
from numpyro_sde.linear.kalman import LinearGaussian, log_likelihood

ROUNDS = 40


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# --- alternatives -----------------------------------------------------------------------------


def ours(form: str = "auto") -> Callable[..., Any]:
    def value(p, y):
        return log_likelihood(
            LinearGaussian(**{k: p[k] for k in ("m0", "P0", "F", "c", "Q", "C", "R")}),
            y,
            form=form,
        )

    return value


def scalar_scan(checkpointed: bool, packed: bool = False) -> Callable[..., Any]:
    """A scalar filter as one writes it by hand; `packed`, all a step reads and makes in vectors."""

    def value(p, y):
        h, r = p["C"][0, 0], p["R"][0]

        def update(m, P, y):
            s, v = h * P * h + r, y - h * m
            K = P * h / s
            return m + K * v, P - K * h * P, -0.5 * (v * v / s + jnp.log(2 * jnp.pi * s))

        def step(carry, x):
            (m, P), (F, c, Q, y) = carry, x
            m, P, log_density = update(F * m + c, F * P * F + Q, y)
            return (m, P), log_density

        def packed_step(z, x):
            (m, P), log_density = step((z[0], z[1]), (x[0], x[1], x[2], x[3]))
            return jnp.stack([m, P]), log_density

        m, P, first = update(p["m0"][0], p["P0"][0, 0], y[0, 0])
        xs = (p["F"][:, 0, 0], p["c"][:, 0], p["Q"][:, 0, 0], y[1:, 0])
        if packed:
            carry, xs, body = jnp.stack([m, P]), jnp.stack(xs, axis=-1), packed_step
        else:
            carry, body = (m, P), step
        body = jax.checkpoint(body) if checkpointed else body
        return first + lax.scan(body, carry, xs)[1].sum()

    return value


BY_HAND = {
    "scalar scan by hand": scalar_scan(False),
    "the same, checkpointed": scalar_scan(True),
    "the same, packed": scalar_scan(False, packed=True),
    "the same, both": scalar_scan(True, packed=True),
}


def matrix_scan(p, y):
    """The usual matrix recursion: Cholesky factorisation and solves in the loop."""
    C, R = p["C"], jnp.diag(p["R"])

    def update(m, P, y):
        L = jnp.linalg.cholesky(C @ P @ C.T + R)
        K = jax.scipy.linalg.cho_solve((L, True), C @ P).T
        z = jax.scipy.linalg.solve_triangular(L, y - C @ m, lower=True)
        log_density = -0.5 * z @ z - jnp.log(jnp.diag(L)).sum() - 0.5 * len(y) * jnp.log(2 * jnp.pi)
        return m + K @ (y - C @ m), P - K @ C @ P, log_density

    def step(carry, x):
        (m, P), (F, c, Q, y) = carry, x
        m, P, log_density = update(F @ m + c, F @ P @ F.T + Q, y)
        return (m, P), log_density

    m, P, first = update(p["m0"], p["P0"], y[0])
    return first + lax.scan(step, (m, P), (p["F"], p["c"], p["Q"], y[1:]))[1].sum()


def cuthbert_filter(parallel: bool = False) -> Callable[..., Any] | None:
    """Cuthbert's filter; it has a transition before the first observation, so y[0] comes twice."""
    try:
        from cuthbert import filter as run
        from cuthbert.gaussian import kalman
    except ImportError:
        return None

    def value(p, y):
        H, chol_R = p["C"], jnp.diag(jnp.sqrt(p["R"]))
        inputs = (p["F"], p["c"], jnp.linalg.cholesky(p["Q"]), y[1:])
        built = kalman.build_filter(
            p["m0"],
            jnp.linalg.cholesky(p["P0"]),
            lambda x: x[:3],
            lambda x: (H, jnp.zeros(H.shape[0]), chol_R, x[3]),
        )
        states = run(built, inputs, built.init_prepare(), parallel=parallel)
        return states.log_normalizing_constant[-1]

    return value


# --- data and timing --------------------------------------------------------------------------


def data(d: int, n: int, p: int = 1) -> tuple[dict[str, jax.Array], jax.Array]:
    """Arrays of a stable linear SDE at irregular times, and observations."""
    rng = np.random.default_rng(d)
    A = -np.eye(d) + 0.3 * rng.normal(size=(d, d))
    L = 0.5 * np.eye(d) + 0.1 * rng.normal(size=(d, d))
    dt = jnp.asarray(rng.uniform(0.05, 0.15, n - 1))
    F, c, Q = jax.jit(transitions)(A, rng.normal(size=d), L, dt)
    arrays = {
        "m0": jnp.zeros(d), "P0": jnp.eye(d), "F": F, "c": c, "Q": Q,
        "C": jnp.asarray(np.eye(p, d) + 0.3 * rng.normal(size=(p, d))), "R": jnp.full(p, 0.1),
    }  # fmt: skip
    return arrays, jnp.asarray(rng.normal(size=(n, p)))


def compiled(value: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Compiled value-and-gradient, and the CPU seconds of tracing and compiling it."""
    start = time.process_time()
    function = jax.jit(jax.value_and_grad(value)).lower(*args).compile()
    return function, time.process_time() - start


def medians(functions: dict[str, Any], args: tuple[Any, ...], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a call of each, taken in turns of five calls."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(*args))
    for _ in range(-(-rounds // 5)):
        for name, function in functions.items():
            jax.block_until_ready(function(*args))  # brings its data back into the caches
            for _ in range(5):
                start = time.process_time()
                jax.block_until_ready(function(*args))
                times[name].append(time.process_time() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def compare(title: str, values: dict[str, Any], args: tuple[Any, ...], rounds: int = ROUNDS):
    """Compile, check, time and print alternatives; the first is ours."""
    built = {name: compiled(value, *args) for name, value in values.items()}
    functions = {name: function for name, (function, _) in built.items()}
    first = next(iter(functions))
    want = functions[first](*args)
    for name, function in functions.items():
        if name.startswith("cuthbert"):  # one observation fewer
            continue
        got = function(*args)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-9, err_msg=name)
        for k, slope in want[1].items():
            other = got[1][k]
            if k in ("P0", "Q"):  # symmetric matrices: only the symmetric part is defined
                slope, other = (0.5 * (x + jnp.swapaxes(x, -1, -2)) for x in (slope, other))
            scale = float(jnp.abs(slope).max())
            np.testing.assert_allclose(other, slope, atol=1e-7 * scale, err_msg=f"{name} {k}")
    times = medians(functions, args, rounds)
    print(f"\n{title}\n{'':30s}{'gradient':>12s}{'ratio':>9s}{'compile':>10s}")
    for name, seconds in times.items():
        ratio = seconds / times[first]
        print(f"  {name:28s}{1e3 * seconds:9.3f} ms{ratio:9.1f}{built[name][1]:8.2f} s")
    return functions[first], times, built[first][1]


def _record(benchmark, function, args, times, compile_time):
    first = next(iter(times))
    benchmark.extra_info["ratios"] = {k: v / times[first] for k, v in times.items()}
    benchmark.extra_info["compile_seconds"] = compile_time
    benchmark.pedantic(lambda: jax.block_until_ready(function(*args)), rounds=ROUNDS)


# --- cases ------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="linear gradient", timer=time.process_time)
@pytest.mark.parametrize("d", [1, 2, 4])
def test_gradient_1000_steps(benchmark, d):
    args = data(d, 1000)
    values = {"sequential (ours)": ours("sequential"), "sqrt (ours)": ours("sqrt")}
    if d == 1:
        values |= BY_HAND
    values["matrix scan, LAPACK"] = matrix_scan
    if (peer := cuthbert_filter()) is not None:
        values["cuthbert"] = peer
    function, times, seconds = compare(f"d = {d}, 1,000 irregular times", values, args)
    if d == 1:
        by_hand = min(times[name] for name in BY_HAND)
        assert times["sequential (ours)"] < 2 * by_hand
    else:
        assert 10 * times["sequential (ours)"] < times["matrix scan, LAPACK"]
    _record(benchmark, function, args, times, seconds)


@pytest.mark.benchmark(group="linear gradient", timer=time.process_time)
def test_gradient_two_instruments(benchmark):
    args = data(2, 1000, p=2)
    values = {"sequential (ours)": ours("sequential"), "matrix scan, LAPACK": matrix_scan}
    out = compare("d = 2, two instruments, 1,000 irregular times", values, args)
    _record(benchmark, out[0], args, *out[1:])


@pytest.mark.benchmark(group="linear gradient", timer=time.process_time)
def test_gradient_100000_scalar_steps(benchmark):
    args = data(1, 100_000)
    values = {"sequential (ours)": ours("sequential")} | BY_HAND
    out = compare("d = 1, 100,000 irregular times", values, args, rounds=7)
    value = jax.jit(ours("sequential"))
    seconds = medians({"value": value}, args, 7)["value"]
    print(f"  {'value alone (ours)':28s}{1e3 * seconds:9.3f} ms")
    assert out[1]["sequential (ours)"] < 0.05
    _record(benchmark, out[0], args, *out[1:])


@pytest.mark.benchmark(group="linear gradient", timer=time.process_time)
def test_gradient_200_series(benchmark):
    parts = [data(2, 100) for _ in range(200)]
    args = jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def many(value):
        return lambda p, y: jax.vmap(value)(p, y).sum()

    values = {"sequential (ours)": many(ours("sequential")), "matrix scan": many(matrix_scan)}
    out = compare("d = 2, 200 series of 100 irregular times", values, args, rounds=10)
    _record(benchmark, out[0], args, *out[1:])


@pytest.mark.benchmark(group="linear gradient", timer=time.process_time)
@pytest.mark.parametrize("d", [1, 2, 4])
def test_gradient_by_the_parameters_of_the_sde(benchmark, d):
    """What a sampler sees: drift and noise in, all steps of different length."""
    rng = np.random.default_rng(d)
    dt = rng.uniform(0.05, 0.15, 999)
    parameters = {
        "A": jnp.asarray(-np.eye(d) + 0.3 * rng.normal(size=(d, d))),
        "b": jnp.asarray(rng.normal(size=d)),
        "L": jnp.asarray(0.5 * np.eye(d)),
        "R": jnp.full(1, 0.1),
    }
    y = jnp.asarray(rng.normal(size=(1000, 1)))
    fixed = {"m0": jnp.zeros(d), "P0": jnp.eye(d), "C": jnp.eye(1, d)}

    def engine(p, y):
        if d == 1:
            F, c, Q = transitions(p["A"][0, 0], p["b"][0], p["L"][0, 0], dt)
            F, c, Q = F[:, None, None], c[:, None], Q[:, None, None]
        else:
            F, c, Q = transitions(p["A"], p["b"], p["L"], dt)
        return ours()(fixed | {"F": F, "c": c, "Q": Q, "R": p["R"]}, y)

    def blocks(p, y):
        zero = jnp.zeros((d, d))
        noise = jnp.block([[-p["A"], p["L"] @ p["L"].T], [zero, p["A"].T]])
        drift = jnp.zeros((d + 1, d + 1)).at[:d, :d].set(p["A"]).at[:d, d].set(p["b"])
        E = jax.vmap(lambda h: jax.scipy.linalg.expm(noise * h))(jnp.asarray(dt))
        F = jnp.swapaxes(E[:, d:, d:], 1, 2)
        c = jax.vmap(lambda h: jax.scipy.linalg.expm(drift * h))(jnp.asarray(dt))[:, :d, d]
        Q = F @ E[:, :d, d:]
        return matrix_scan(fixed | {"F": F, "c": c, "Q": Q, "R": p["R"]}, y)

    values = {"engine (ours)": engine, "expm and matrix scan": blocks}
    out = compare(f"d = {d}, by (A, b, L, R), 1,000 times", values, (parameters, y), rounds=10)
    _record(benchmark, out[0], (parameters, y), *out[1:])
