"""What NumPyro asks of a distribution, for the fractional laws and for paths that remember."""

import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde import testing
from numpyro_sde.distributions import (
    FractionalBrownianMotion,
    FractionalGaussianNoise,
    FractionalOrnsteinUhlenbeck,
)

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # The laws here are small, their steps too long on purpose.
    pytest.mark.filterwarnings("ignore::numpyro_sde.distributions.step_check.CoarseStepWarning"),
]

TIMES = jnp.array([0.3, 0.7, 1.0, 1.4])


def noise(dt, hurst, scale):
    return FractionalGaussianNoise(4, dt, hurst, scale)


def motion(times, hurst, scale):
    return FractionalBrownianMotion(times, hurst, scale)


def second_kind(hurst, scale):
    return FractionalBrownianMotion(np.array([0.2, 0.5, 0.9]), hurst, scale, kind=2)


def from_zero(hurst, scale):
    return FractionalBrownianMotion(np.arange(5) * 0.5, hurst, scale)


def stationary(times, hurst, rate, scale, mean):
    return FractionalOrnsteinUhlenbeck(times, hurst, rate, scale, mean)


def zero_start(hurst, rate):
    return FractionalOrnsteinUhlenbeck(np.array([0.0, 0.4, 1.0]), hurst, rate, start="zero")


def driven(hurst, scale):
    sde = nsde.SDE(
        lambda t, x, p: -x, lambda t, x, p: p, params=scale, noise=nsde.noise.MarkovFBM(hurst, 3)
    )
    return nsde.SDEPath(sde, np.arange(4) * 0.5, init=0.3)


def _f(*values):
    return tuple(jnp.asarray(v, jnp.float32) for v in values)


LAWS = {
    "noise": (noise, _f(0.5, 0.3, 1.2), {"dt": 0, "hurst": 1}),
    "motion": (motion, (TIMES, *_f(0.7, 1.2)), {"times": 0, "scale": 2}),
    "batch of motions": (motion, (TIMES, *_f([0.2, 0.4, 0.7], [[1.0], [2.0]])), {"hurst": 1}),
    "kind 2": (second_kind, _f(0.3, 1.2), None),
    "from zero": (from_zero, _f(0.3, 1.2), None),
    "stationary": (stationary, (TIMES, *_f(0.3, 1.5, 0.7, 2.0)), {"rate": 2, "mean": 4}),
    "zero start": (zero_start, _f(0.7, 1.5), None),
    "driven path": (driven, _f(0.3, 0.8), None),
    "batch of driven paths": (driven, _f([0.3, 0.6], [[0.8], [0.5], [0.7]]), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_contract(name, key):
    make, args, fields = LAWS[name]
    testing.check_distribution(make, key, args=args, fields=fields)
