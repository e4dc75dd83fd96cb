"""Maps of one state read off the trace of a whole path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.models.timewise import MixesTimesError, times_of_path, timewise_map

T = 5
CLOCK = jnp.arange(1.0, T + 1)
X = jax.random.normal(jax.random.key(0), (T, 2))

APART = {
    "component": lambda x: 2 * x[..., 0],
    "function": jnp.exp,
    "matrix": lambda x: x @ jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    "by time": lambda x: x[:, 0] * x[:, 1] * CLOCK,
    "column by time": lambda x: jax.nn.softplus(x - CLOCK[:, None]),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "reduced": lambda x: jnp.clip(x.sum(-1), 0, 1),
    "stacked": lambda x: jnp.stack([x[:, 1], x[:, 0]], -1),
    "norm": lambda x: jnp.linalg.norm(x, axis=-1),
    "row": lambda x: x * jnp.array([1.0, 2.0]),
    "selected": lambda x: 3.0 * times_of_path(x, np.array([0, 2]), axis=0),
    "jitted": jax.jit(lambda x: jnp.tanh(x) ** 2),
}
MIXED = {
    "mean": lambda x: x - x.mean(0),
    "later": lambda x: x[1:],
    "sum": lambda x: jnp.cumsum(x, axis=0),
    "reversed": lambda x: x[::-1],
    "by position": lambda x: x[jnp.array([1, 0, 2, 3, 4])],
    "matrix of times": lambda x: jnp.ones((T, T)) @ x,
    "nothing": lambda x: jnp.ones((T,)),
}


def trace(fn):
    closed = jax.make_jaxpr(fn)(X)
    return timewise_map(closed.jaxpr, closed.consts, (T,))


@pytest.mark.parametrize("name", APART)
def test_the_map_of_one_state_is_that_of_the_path(name):
    found = trace(APART[name])
    now = found.on_grid(T)
    got = jnp.stack([found.apply(X[i], [c[i] for c in now]) for i in range(T)])
    want = APART[name](X)
    rows = np.arange(T) if found.rows is None else np.asarray(found.rows)
    np.testing.assert_allclose(got[rows], want, rtol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_times_is_refused(name):
    with pytest.raises(MixesTimesError):
        trace(MIXED[name])


def test_batches_of_paths_keep_their_axes():
    many = jnp.stack([X, 2.0 * X, 3.0 * X])
    scale = jnp.array([1.0, 2.0, 3.0])
    closed = jax.make_jaxpr(lambda x: scale[:, None, None] * x + CLOCK[:, None])(many)
    found = timewise_map(closed.jaxpr, closed.consts, (3, T))
    consts = found.on_grid(T, 1)
    want = scale[:, None, None] * many + CLOCK[:, None]
    for series in range(3):
        for k in range(T):
            now = [c[min(series, c.shape[0] - 1), k] for c in consts]
            got = found.apply(many[series, k], now)
            np.testing.assert_allclose(got, want[series, k], rtol=1e-6)
