"""The Kalman filter and smoother in all forms, against the dense joint law."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import NAMES, build, error, make
from oracles import dense_gaussian_ssm

from numpyro_sde.linear.kalman import LinearGaussian, choose_form, kalman_filter, log_likelihood
from numpyro_sde.linear.smoothing import smoother

# A compilation for each shape and form is what takes time: the default run covers the
# sequential form for every model, the others where they share a shape, and d = 4 in the
# square-root form; `-m slow` has the rest.
_SHARED = {n for n in NAMES if n == "scalar" or make(n)["C"].shape == (1, 2)}


def _cases(quick):
    return [
        pytest.param(name, form, marks=() if quick(name, form) else pytest.mark.slow)
        for form in ("sequential", "sqrt", "parallel")
        for name in NAMES
    ]


CASES = _cases(lambda n, f: f == "sequential" or n in _SHARED or (n, f) == ("d4", "sqrt"))
CASES_32 = _cases(lambda n, f: f != "parallel" and n in _SHARED)


@partial(jax.jit, static_argnames="form")
def run(model, y, mask, form):
    filtered = kalman_filter(model, y, mask, form=form)
    return filtered, smoother(model, filtered, form=form), log_likelihood(model, y, mask, form=form)


@partial(jax.jit, static_argnames="form")
def value_only(model, y, mask, form):
    return log_likelihood(model, y, mask, form=form)


def _check(arrays, results, bound):
    filtered, smoothed, value = results
    want = dense_gaussian_ssm(**arrays)
    assert error(value, want.log_likelihood) < bound
    assert error(filtered.log_likelihood, want.log_likelihood) < bound
    assert error(filtered.increments, want.increments) < bound
    assert error(filtered.mean, want.filtered_mean) < bound
    assert error(filtered.cov, want.filtered_cov) < bound
    assert error(filtered.predicted_mean, want.predicted_mean) < bound
    assert error(filtered.predicted_cov, want.predicted_cov) < bound
    assert error(smoothed.mean, want.smoothed_mean) < bound
    assert error(smoothed.cov, want.smoothed_cov) < bound
    assert error(smoothed.cross, want.smoothed_cross) < bound


@pytest.mark.parametrize(("name", "form"), CASES)
def test_equals_dense_law(name, form, x64):
    arrays = make(name)
    _check(arrays, run(*build(arrays, jnp.float64), form), 1e-8)


@pytest.mark.parametrize(("name", "form"), CASES_32)
def test_float32_is_close(name, form):
    arrays = make(name)
    results = run(*build(arrays, jnp.float32), form)
    assert results[0].mean.dtype == jnp.float32
    _check(arrays, results, 1e-3)


def test_parameters_that_vary_with_time(x64):
    arrays = make("d2 two instruments")
    rng = np.random.default_rng(3)
    T, p, d = 12, 2, 2
    arrays["C"] = rng.normal(size=(T, p, d))
    arrays["e"] = rng.normal(size=(T, p))
    variances = rng.uniform(0.1, 1.0, size=(T, p))
    arrays["R"] = np.stack([np.diag(v) for v in variances])
    model, y, mask = build({**arrays, "R": np.eye(p)}, jnp.float64)
    model = LinearGaussian(
        m0=model.m0, P0=model.P0, F=model.F, c=model.c, Q=model.Q,
        C=model.C, R=jnp.asarray(variances), e=model.e,
    )  # fmt: skip
    _check(arrays, run(model, y, mask, "sequential"), 1e-8)


def test_one_time_and_no_mask(x64):
    arrays = make("d2 two instruments")
    arrays = {**arrays, **{k: arrays[k][:0] for k in "FcQ"}, "y": arrays["y"][:1], "mask": None}
    model, y, _ = build({**arrays, "mask": np.ones((1, 2), bool)}, jnp.float64)
    _check(arrays, run(model, y, None, "sequential"), 1e-8)


def test_masked_values_are_not_read(x64):
    arrays = make("scalar two instruments")
    model, y, mask = build(arrays, jnp.float64)
    valued = jax.jit(jax.value_and_grad(log_likelihood, argnums=1))
    clean, _ = valued(model, y, mask)
    value, slope = valued(model, jnp.where(mask, y, jnp.nan), mask)
    assert float(value) == float(clean)
    assert bool(jnp.isfinite(slope).all())


def test_batches_by_vmap_agree_with_one_by_one(x64):
    arrays = make("d2 two instruments")
    model, y, mask = build(arrays, jnp.float64)
    ys = y + jnp.arange(3.0)[:, None, None]
    got = jax.jit(jax.vmap(lambda y: log_likelihood(model, y, mask)))(ys)
    want = [
        dense_gaussian_ssm(**{**arrays, "y": arrays["y"] + shift}).log_likelihood
        for shift in range(3)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-8)


def _exact(arrays):
    """The log likelihood of a scalar-observation model, in rational arithmetic."""
    F, c, Q, m0, P0 = (
        np.vectorize(Fraction, otypes=[object])(arrays[k]) for k in ("F", "c", "Q", "m0", "P0")
    )
    h, r = [Fraction(x) for x in arrays["C"][0]], Fraction(arrays["R"][0, 0])
    m, P, total = m0, P0, 0.0
    for k, y in enumerate(arrays["y"][:, 0]):
        if k:
            m, P = F[k - 1] @ m + c[k - 1], F[k - 1] @ P @ F[k - 1].T + Q[k - 1]
        u = P @ h
        s, v = u @ h + r, Fraction(y) - m @ h
        m, P = m + u * (v / s), P - np.outer(u, u) / s
        total -= 0.5 * (np.log(2 * np.pi) + np.log(float(s)) + float(v * v / s))
    return total


@pytest.mark.parametrize(
    ("form", "dtype", "bound"),
    [("sqrt", jnp.float64, 1e-9), ("sqrt", jnp.float32, 1e-3), ("auto", jnp.float32, 1e-3)],
)
def test_digits_of_precise_observations_are_kept(form, dtype, bound):
    # a state known to 1e-3 (float32) from a prior of 1e3: variances 12 orders apart
    arrays = make("hypoelliptic")
    arrays["P0"], arrays["R"] = 1e6 * np.eye(2), np.array([[1e-6]])
    arrays["C"], arrays["e"] = np.array([[1.0, 0.5]]), np.zeros(1)
    arrays["mask"] = np.ones_like(arrays["mask"])
    arrays["y"] = np.cumsum(arrays["y"], axis=0) * 1e-3
    arrays["m0"] = 0 * arrays["m0"]
    with jax.enable_x64(dtype == jnp.float64):
        model, y, mask = build(arrays, dtype)
        rounded = {k: np.asarray(getattr(model, k), np.float64) for k in ("m0", "P0", *"FcQC")}
        rounded |= {"y": np.asarray(y, np.float64), "R": np.asarray(model.R, np.float64)[None]}
        assert error(value_only(model, y, mask, form), _exact(rounded)) < bound


@pytest.mark.parametrize("form", ["sequential", "sqrt"])
@pytest.mark.parametrize("name", ["R", "Q", "P0"])
def test_negative_variance_gives_nan(name, form):
    model, y, mask = build(make("d2"), jnp.float32)
    value = getattr(model, name)
    bad = jnp.where(jnp.eye(value.shape[-1], dtype=bool), -30.0, value)
    bad = jnp.full_like(value, -30.0) if value.ndim == 1 else bad
    model = eqx.tree_at(lambda m: getattr(m, name), model, bad)
    assert np.isnan(float(value_only(model, y, mask, form)))


def test_wrong_shapes_and_names_are_refused():
    model, y, mask = build(make("d2"), jnp.float32)
    with pytest.raises(ValueError, match=r"y must have shape \(T, p\) = \(12, 1\)"):
        log_likelihood(model, y[:-1], mask)
    with pytest.raises(ValueError, match="mask must have shape"):
        kalman_filter(model, y, mask[:, 0])
    with pytest.raises(ValueError, match="form must be one of"):
        kalman_filter(model, y, mask, form="fast")
    with pytest.raises(ValueError, match=r"Q has shape \(2, 2\), needs \(11, 2, 2\)"):
        eqx.tree_at(lambda m: m.Q, model, model.Q[0]).__check_init__()
    with pytest.raises(ValueError, match=r"R has shape \(2,\), needs \(1,\) or \(12, 1\)"):
        eqx.tree_at(lambda m: m.R, model, jnp.ones(2)).__check_init__()
    with pytest.raises(ValueError, match="Q_factor has shape"):
        LinearGaussian(
            m0=model.m0, P0=model.P0, F=model.F, c=model.c, Q=model.Q, C=model.C, R=model.R,
            Q_factor=jnp.ones((2, 1)),
        )  # fmt: skip


def test_auto_form_follows_platform_size_and_precision(monkeypatch):
    assert choose_form("auto", 1000, 2, jnp.float64) == "sequential"
    assert choose_form("auto", 1000, 1, jnp.float32) == "sequential"
    assert choose_form("auto", 1000, 2, jnp.float32) == "sqrt"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_form("auto", 1000, 2, jnp.float32) == "parallel"
    assert choose_form("auto", 10, 2, jnp.float64) == "sequential"
    assert choose_form("sqrt", 1000, 2, jnp.float64) == "sqrt"
