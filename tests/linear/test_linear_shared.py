"""One transition and one observation for all steps; covariances watched for lost digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.linear import recursions
from numpyro_sde.linear.kalman import LinearGaussian, log_likelihood
from numpyro_sde.linear.recursions import ScalarSteps

D, N = 3, 9


def shared(dtype=jnp.float64, prior=1.0, noise=0.1):
    rng = np.random.default_rng(0)
    F = np.diag([0.9, 0.5, 0.2])
    F[0, 1:] = 0.3
    L = 0.3 * rng.normal(size=(D, D))
    arrays = ScalarSteps(
        m0=np.zeros(D),
        P0=prior * np.eye(D),
        F=F[None],
        c=np.full((1, D), 0.1),
        Q=(L @ L.T)[None],
        h=np.array([[1.0, 0.5, 0.0]]),
        r=np.array([noise]),
        y=rng.normal(size=N),
    )
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)


def spread(steps):
    """The same with arrays for each step."""

    def each(name):
        a = getattr(steps, name)
        return jnp.broadcast_to(a, (N - (name in "FcQ"), *a.shape[1:]))

    return steps._replace(**{name: each(name) for name in "FcQhr"})


@pytest.mark.parametrize("form", ["sequential", "sqrt", "parallel", "guarded"])
def test_one_law_for_all_steps_equals_a_law_for_each(form, x64):
    value = jax.jit(jax.value_and_grad(lambda s: recursions.log_likelihood(s, form)))
    each = jax.jit(
        jax.value_and_grad(
            lambda s: recursions.increments(recursions.predict(spread(s), form)).sum()
        )
        if form == "sequential"
        else jax.value_and_grad(lambda s: recursions.log_likelihood(spread(s), form))
    )
    (got, slopes), (want, wanted) = value(shared()), each(shared())
    np.testing.assert_allclose(got, want, rtol=1e-12)
    for name in "FcQhry":
        a, b = (getattr(x, name) for x in (slopes, wanted))
        if name == "Q":
            a, b = (x + jnp.swapaxes(x, -1, -2) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=name)


def test_shared_arrays_through_the_public_function(x64):
    s = shared()
    model = LinearGaussian(m0=s.m0, P0=s.P0, F=s.F, c=s.c, Q=s.Q, C=s.h, R=s.r)
    whole = spread(s)
    full = LinearGaussian(m0=s.m0, P0=s.P0, F=whole.F, c=whole.c, Q=whole.Q, C=s.h, R=s.r)
    y = s.y[:, None]
    np.testing.assert_allclose(log_likelihood(model, y), log_likelihood(full, y), rtol=1e-12)
    two = jnp.stack([s.y, 0.5 * s.y], axis=1)
    C, R = jnp.concatenate([s.h, jnp.eye(D)[1:2]]), jnp.full(2, 0.1)
    pair = [LinearGaussian(m0=m.m0, P0=m.P0, F=m.F, c=m.c, Q=m.Q, C=C, R=R) for m in (model, full)]
    np.testing.assert_allclose(*(log_likelihood(m, two) for m in pair), rtol=1e-12)


@pytest.mark.parametrize("form", ["sequential", "sqrt", "parallel"])
def test_shared_transition_with_observations_that_vary(form, x64):
    """Values and slopes are those with a transition for each step."""
    s, whole, rng = shared(), spread(shared()), np.random.default_rng(1)
    C, e = jnp.asarray(rng.normal(size=(N, 1, D))), jnp.asarray(rng.normal(size=(N, 1)))
    R = jnp.asarray(rng.uniform(0.1, 0.5, size=(N, 1)))

    def value(steps, C, R, e):
        model = LinearGaussian(
            m0=steps.m0, P0=steps.P0, F=steps.F, c=steps.c, Q=steps.Q, C=C, R=R, e=e
        )
        return log_likelihood(model, s.y[:, None], form=form)

    got, want = (jax.value_and_grad(value, (1, 2, 3))(one, C, R, e) for one in (s, whole))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="C has shape"):
        value(s, C[:-1], R, e)


@pytest.mark.slow
def test_guard_takes_factors_where_digits_are_lost():
    """Among models of one batch, those of a prior vague beside the noise, and the others."""
    priors, noises = np.array([1.0, 1e6, 1e4]), np.array([0.1, 1e-6, 1e-2])
    models = [shared(jnp.float32, p, r) for p, r in zip(priors, noises, strict=True)]
    batch = jax.tree.map(lambda *a: jnp.stack(a), *models)
    lost = [recursions._loses_digits(s, recursions._scan_covariances(s)) for s in models]
    assert [bool(x) for x in lost] == [False, True, True]
    value = jax.jit(jax.vmap(lambda s: recursions.log_likelihood(s, "guarded")))(batch)
    with jax.enable_x64(True):
        exact = [
            recursions.log_likelihood(
                jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), s), "sqrt"
            )
            for s in models
        ]
    np.testing.assert_allclose(value, np.array(exact), rtol=2e-5)


@pytest.mark.slow
def test_guarded_likelihood_has_second_derivatives_by_every_mode():
    steps = shared(jnp.float32)

    def value(t):
        return recursions.log_likelihood(steps._replace(Q=steps.Q * jnp.exp(t)), "guarded")

    reverse = jax.jit(jax.grad(jax.grad(value)))(0.0)
    forward = jax.jit(jax.jacfwd(jax.grad(value)))(0.0)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), steps)

        def plain(t):
            s = spread(double)
            return recursions.increments(
                recursions.predict(s._replace(Q=s.Q * jnp.exp(t)), "sequential")
            ).sum()

        want = float(jax.jacfwd(jax.jacfwd(plain))(0.0))
    np.testing.assert_allclose([reverse, forward], want, rtol=1e-3)


OTHER_FORMS = ["sequential", "sqrt", "parallel"]


def observed_otherwise(of_each):
    steps = spread(shared()) if of_each else shared()
    return steps._replace(y=steps.y.at[3].set(2.0))


@pytest.mark.parametrize("form", [*OTHER_FORMS, "guarded"])
@pytest.mark.parametrize("of_each", [False, True], ids=["shared", "of each step"])
def test_rows_that_are_diagonal_need_not_be_read(form, of_each, x64):
    """Transitions of which only the first row is full: the same numbers by fewer products."""
    steps = observed_otherwise(of_each)

    def both(coupled, steps):
        return jax.value_and_grad(lambda s: recursions.log_likelihood(s, form, coupled))(steps)

    (got, slopes), (want, wanted) = (both(coupled, steps) for coupled in (1, None))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    read = np.eye(D) + np.eye(D)[:, :1] > 0
    for name in ScalarSteps._fields[:8]:
        a, b = (np.asarray(getattr(x, name)) for x in (slopes, wanted))
        if name == "F":
            a, b = a[:, read], b[:, read]
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(
    "form", ["guarded", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHER_FORMS)]
)
@pytest.mark.parametrize("of_each", [False, True], ids=["shared", "of each step"])
def test_curvature_and_batches_where_rows_are_diagonal(form, of_each, x64):
    steps = observed_otherwise(of_each)
    want = recursions.log_likelihood(steps, form, None)
    curvature = [
        jax.hessian(lambda r, c=c: recursions.log_likelihood(steps._replace(r=r), form, c))(steps.r)
        for c in (1, None)
    ]
    np.testing.assert_allclose(*curvature, rtol=1e-8, atol=1e-9)
    batch = jax.vmap(lambda y: recursions.log_likelihood(steps._replace(y=y), form, 1))
    np.testing.assert_allclose(batch(jnp.stack([steps.y] * 2))[1], want, rtol=1e-12)
