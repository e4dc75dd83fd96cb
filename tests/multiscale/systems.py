"""Slow-fast systems with known limits, as in Pavliotis and Stuart (2008) and their like.

Each has its averaged drift or square in closed form, or by an independent quadrature.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy.integrate import quad

import numpyro_sde as nsde

OU = {"a": 1.0, "b": 0.6, "c": 0.8, "q": 0.5, "s": 0.4}
LANDAU = {"v": 0.3, "s": 0.3}


def _relax(t, x, y, p):
    return x - y


def _variance(t, x, y, p):
    return jnp.sqrt(2.0 * p["v"])


def ou_ou(epsilon=0.1, **kwargs):
    """S1: the law of y given x is N(c x, q), the averaged drift -(a - b c) x."""
    return nsde.SlowFastSDE(
        lambda t, x, y, p: -p["a"] * x + p["b"] * y,
        lambda t, x, y, p: p["s"],
        lambda t, x, y, p: p["c"] * x - y,
        lambda t, x, y, p: jnp.sqrt(2.0 * p["q"]),
        epsilon,
        params={**OU, **kwargs},
    )


def ou_ou_drift(x):
    return -(OU["a"] - OU["b"] * OU["c"]) * np.asarray(x)


def landau(epsilon=0.1, v=0.3):
    """S2: averaging makes a double well, (1 - v) x - x^3."""
    return nsde.SlowFastSDE(
        lambda t, x, y, p: x * (1.0 - y**2),
        lambda t, x, y, p: p["s"],
        _relax,
        _variance,
        epsilon,
        params={**LANDAU, "v": v},
    )


def landau_drift(x, v=0.3):
    return (1.0 - v) * np.asarray(x) - np.asarray(x) ** 3


def noisy(epsilon=0.1):
    """S2b: the averaged square of the diffusion is 0.2 + x^2 + v."""
    return nsde.SlowFastSDE(
        lambda t, x, y, p: -x,
        lambda t, x, y, p: jnp.sqrt(0.2 + y**2),
        _relax,
        _variance,
        epsilon,
        params=LANDAU,
    )


def noisy_square(x):
    return 0.2 + np.asarray(x) ** 2 + LANDAU["v"]


def bimodal(epsilon=0.1):
    """S3: the fast law is bimodal, exp(-(y^4/4 - y^2/2 - k x y) / T)."""
    return nsde.SlowFastSDE(
        lambda t, x, y, p: y - x,
        lambda t, x, y, p: p["s"],
        lambda t, x, y, p: y - y**3 + p["k"] * x,
        lambda t, x, y, p: jnp.sqrt(2.0 * p["T"]),
        epsilon,
        params={"k": 1.0, "T": 0.5, "s": 0.3},
    )


def bimodal_drift(x):
    def mean(x):
        def weight(y):
            return np.exp(-(y**4 / 4 - y**2 / 2 - x * y) / 0.5)

        return quad(lambda y: y * weight(y), -6, 6)[0] / quad(weight, -6, 6)[0]

    return np.array([mean(one) - one for one in np.ravel(x)])


NUM_BATH = 10
KAPPA, DEPTH, WIDTH = 1.0, 4.0, 0.5


def bath_covariance():
    """S8: springs to the origin and to both neighbours along a chain, all of stiffness 1."""
    chain = 2.0 * np.eye(NUM_BATH) - np.eye(NUM_BATH, k=1) - np.eye(NUM_BATH, k=-1)
    chain[0, 0] = chain[-1, -1] = 1.0
    return np.linalg.inv(np.eye(NUM_BATH) + chain)


def bath_force(t, x, y, p):
    gap = x - y
    push = jnp.mean(gap * jnp.exp(-(gap**2) / (2.0 * WIDTH**2)))
    return -KAPPA * x + DEPTH / WIDTH**2 * push


def tagged_particle(epsilon=0.1, scale=0.5):
    """S8: a particle pushed by ten bath particles in equilibrium."""
    precision = jnp.asarray(np.linalg.inv(bath_covariance()))
    return nsde.SlowFastSDE(
        bath_force,
        lambda t, x, y, p: p["scale"],
        lambda t, x, y, p: -p["precision"] @ y,
        lambda t, x, y, p: jnp.sqrt(2.0),
        epsilon,
        params={"scale": scale, "precision": precision},
        event_dims={"precision": 2},
        fast_dim=NUM_BATH,
    )


def tagged_particle_drift(x):
    x = np.asarray(x)[..., None]
    spread = WIDTH**2 + np.diag(bath_covariance())
    push = x * WIDTH**3 / spread**1.5 * np.exp(-(x**2) / (2.0 * spread))
    return -KAPPA * x[..., 0] + DEPTH / WIDTH**2 * push.mean(axis=-1)


def rough_potential(epsilon=0.05):
    """S4: V = x^2/2 and p = cos at temperature 1/2; slowed down by 1 / I_0(2)^2."""
    return nsde.multiscale.TwoScaleLangevin(
        lambda x, p: p["alpha"] * x**2 / 2,
        lambda y, p: jnp.cos(y),
        epsilon,
        0.5,
        params={"alpha": 1.0},
    )


TRIAD = {"B": (-1.0, 0.4, 0.6), "gamma": (1.0, 2.0), "sigma": (1.0, 1.0)}


def triad(epsilon=0.1):
    """S6: Majda, Timofeyev and Vanden-Eijnden's triad."""
    return nsde.SlowFastSDE(
        lambda t, x, y, p: 0.0 * x,
        lambda t, x, y, p: 0.0,
        lambda t, x, y, p: -p["gamma"] * y,
        lambda t, x, y, p: p["sigma"],
        epsilon,
        params={k: jnp.asarray(v) for k, v in TRIAD.items()},
        event_dims={"B": 1, "gamma": 1, "sigma": 1},
        fast_dim=2,
        scaling="homogenization",
        slow_forcing=lambda t, x, y, p: p["B"][0] * y[0] * y[1],
        fast_forcing=lambda t, x, y, p: x * jnp.stack([p["B"][1] * y[1], p["B"][2] * y[0]]),
    )


def triad_limit(x):
    (b1, b2, b3), (g1, g2), (s1, s2) = TRIAD.values()
    rate = b1 / (2 * (g1 + g2)) * (b2 * s2**2 / g2 + b3 * s1**2 / g1)
    return rate * np.asarray(x), (b1 * s1 * s2) ** 2 / (2 * g1 * g2 * (g1 + g2))


def coloured_noise(epsilon=0.1):
    """S7: dX = -x + sqrt((1 + x^2) / 4) y / eps with an Ornstein-Uhlenbeck y."""
    return nsde.SlowFastSDE(
        lambda t, x, y: -x,
        lambda t, x, y: 0.0,
        lambda t, x, y: -y,
        lambda t, x, y: jnp.sqrt(2.0),
        epsilon,
        scaling="homogenization",
        slow_forcing=lambda t, x, y: jnp.sqrt(0.25 + 0.25 * x**2) * y,
    )


def coloured_noise_limit(x):
    """Ito drift h + f f' and square 2 f^2."""
    x = np.asarray(x)
    return -x + 0.25 * x, 0.5 + 0.5 * x**2
