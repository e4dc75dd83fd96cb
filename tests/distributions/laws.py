"""Path and observation laws on which the contract is checked: a constructor and its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import numpyro_sde as nsde
from numpyro_sde.distributions.observation import Emission, EmissionPath

TIMES = np.array([0.0, 0.1, 0.25, 0.5])
STATES = np.array([0.3, -0.2, 0.5, 1.1], np.float32)


class Case(NamedTuple):
    make: Any
    args: tuple[Any, ...]
    fields: dict[str, int] | None = None
    density: bool = True  # cheap enough, and unbatched: draws are compared with the density


def _ou(rate, scale, event_dims=None):
    return nsde.SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
        event_dims=event_dims,
    )


def _linear(a, factor):
    return nsde.SDE(
        lambda t, x, p: p["a"] @ x,
        lambda t, x, p: p["factor"],
        params={"a": a, "factor": factor},
        event_dims={"a": 2, "factor": 2},
    )


def scalar(rate, scale, times, loc):
    return nsde.SDEPath(_ou(rate, scale), times, init=dist.Normal(loc, 1.0))


def multiplicative(rate, scale):
    sde = nsde.SDE(
        lambda t, x, p: p["rate"] * jnp.cos(x + t),
        lambda t, x, p: p["scale"] * jnp.sqrt(1.0 + x**2),
        params={"rate": rate, "scale": scale},
    )
    return nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0))


def stratonovich(scale):
    sde = nsde.SDE(
        lambda t, x, p: -x,
        lambda t, x, p: p * jnp.exp(0.3 * jnp.sin(x)),
        params=scale,
        interpretation="stratonovich",
    )
    return nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0))


def diagonal(rate, scale, loc):
    sde = _ou(rate, scale, {"rate": 1, "scale": 1})
    return nsde.SDEPath(sde, TIMES[:3], init=dist.Normal(loc, 1.0).to_event(1))


def linear(a, factor):
    init = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    return nsde.SDEPath(_linear(a, factor), TIMES[:3], init=init)


def batch_by_params(rate, scale):
    return nsde.SDEPath(_ou(rate, scale), TIMES, init=dist.Normal(0.0, 1.0))


def batch_by_times(rate, times):
    return nsde.SDEPath(_ou(rate, 0.5), times, init=dist.Normal(0.0, 1.0))


def batch_by_init(rate, loc):
    return nsde.SDEPath(_ou(rate, 0.5), TIMES, init=dist.Normal(loc, 1.0))


def batch_of_vectors(a, factor, loc):
    init = dist.Normal(loc, 1.0).to_event(1)
    return nsde.SDEPath(_linear(a, factor), TIMES, init=init)


def fixed_start(rate, scale):
    return nsde.SDEPath(_ou(rate, scale), TIMES, init=0.7)


def fixed_vector_start(rate, scale):
    return nsde.SDEPath(_ou(rate, scale), TIMES[:3], init=jnp.array([0.7, -0.3]))


def on_grid(rate, scale):
    grid = nsde.TimeGrid([0.0, 0.3, 0.5], max_step=0.1)
    return nsde.SDEPath(_ou(rate, scale), grid, init=dist.Normal(0.0, 1.0))


def one_time(loc):
    return nsde.SDEPath(_ou(1.0, 1.0), [0.0], init=dist.Normal(loc, 1.0))


def _f(*values):
    return tuple(jnp.asarray(v, jnp.float32) for v in values)


_A = [[-1.0, 0.4], [0.2, -0.5]]
_SQUARE = [[0.5, 0.1], [0.2, 0.8]]
_WIDE = [[0.5, 0.1, 0.3], [0.2, 0.8, -0.4]]
_TWO_CLOCKS = [[0.0, 0.1, 0.25, 0.5], [1.0, 1.3, 1.4, 2.0]]

PATHS = {
    "scalar": Case(scalar, _f(1.0, 0.5, TIMES, 0.2), {"times": 2, "init": 3, "sde": 0}),
    "multiplicative": Case(multiplicative, _f(1.0, 0.5)),
    "stratonovich": Case(stratonovich, _f(0.5)),
    "diagonal": Case(diagonal, _f([1.0, 2.0], [0.5, 0.3], [0.0, 1.0])),
    "general": Case(linear, _f(_A, _SQUARE)),
    "more noises": Case(linear, _f(_A, _WIDE)),
    "batch by params": Case(batch_by_params, _f([1.0, 2.0, 3.0], [[0.5], [0.7]])),
    "batch by times": Case(batch_by_times, _f(1.0, _TWO_CLOCKS), {"times": 1}),
    "batch by init": Case(batch_by_init, _f(1.0, [0.1, 0.2, 0.3]), {"init": 1}),
    "batch of vectors": Case(
        batch_of_vectors, _f(np.stack([_A, _A, _A]), _SQUARE, np.zeros((2, 1, 2)))
    ),
    "fixed start": Case(fixed_start, _f(1.0, 0.5)),
    "fixed vector start": Case(fixed_vector_start, _f(1.0, 0.5)),
    "grid": Case(on_grid, _f(1.0, 0.5)),
    "one time": Case(one_time, _f(0.3), {"init": 0}),
}


def _emitted(fn, states, state_shape=(), params=None, event_dims=None, inputs=None, times=TIMES):
    batch = jnp.shape(states)[: jnp.ndim(states) - 1 - len(state_shape)]
    emission = Emission(fn, params, event_dims, inputs, len(TIMES), batch)
    return EmissionPath(emission, times, states, state_shape)


def normal(states):
    return _emitted(lambda t, x: dist.Normal(x + t, 0.3), states)


def normal_with_params(states, scale, inputs):
    def fn(t, x, p, u):
        return dist.Normal(x * u, p["scale"])

    return _emitted(fn, states, params={"scale": scale}, inputs=inputs)


def multivariate(states, tril):
    def fn(t, x, p):
        return dist.MultivariateNormal(jnp.stack([x, -x]), scale_tril=p)

    return _emitted(fn, states, params=tril, event_dims=2)


def independent_components(states):
    return _emitted(lambda t, x: dist.Normal(x, 0.3).to_event(1), states, (2,))


def batch_components(states):
    return _emitted(lambda t, x: dist.Normal(x, 0.3), states, (2,))


def student(states, df):
    return _emitted(lambda t, x, p: dist.StudentT(p, x, 0.3), states, params=df)


def poisson(states):
    return _emitted(lambda t, x: dist.Poisson(jnp.exp(0.3 * x)), states)


def uniform(states):
    return _emitted(lambda t, x: dist.Uniform(jnp.zeros(2), jnp.array([1.0, 2.0])), states)


def binomial(states, totals):
    return _emitted(lambda t, x, u: dist.Binomial(u, logits=x), states, inputs=totals)


def gamma(states, concentration):
    def fn(t, x, p):
        return dist.Gamma(p, jnp.exp(x))

    return _emitted(fn, states, params=concentration)


EMISSIONS = {
    "normal": Case(normal, _f(STATES)),
    "normal, params and inputs": Case(normal_with_params, _f(STATES, 0.4, [1.0, 2.0, 0.5, 1.5])),
    "multivariate normal": Case(multivariate, _f(STATES, [[0.5, 0.0], [0.2, 0.7]])),
    "to_event": Case(independent_components, _f(STATES[:, None] * [1.0, 2.0])),
    "batch dimension of the emission": Case(batch_components, _f(STATES[:, None] * [1.0, 2.0])),
    "batch": Case(normal_with_params, _f(np.stack([STATES] * 3), [0.4, 0.5, 0.6], np.ones(4))),
    "Student": Case(student, _f(STATES, 5.0)),
    "Poisson": Case(poisson, _f(STATES)),
    "uniform": Case(uniform, _f(STATES)),
    "binomial": Case(binomial, (*_f(STATES), jnp.array([1, 2, 1, 3]))),
    "gamma": Case(gamma, _f(STATES, 2.0)),
}
