"""A particle in two wells, pulled towards the level `b`, said in the ways of the linear cases."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from grid_truth import GridTruth, normal
from numpyro import handlers

import numpyro_sde as nsde
from numpyro_sde.testing.ways import NAN, Way, Y, add_to, level

TIMES, SCALE, START, DEGREES, WIDTH = np.array([0.0, 0.3, 0.5]), 0.9, 0.8, 4.0, 0.4
CASES: list[Way] = []
case = partial(add_to, CASES)


def pull(x, b):
    return x - x**3 + b


def wells(b):
    sde = nsde.SDE(lambda t, x, b: pull(x, b), lambda t, x, b: SCALE, params=b)
    return numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, START)))


def seen(x, y, name="y", slope=1.0):
    """Readings with heavy tails."""
    nsde.observe(name, x, lambda t, x: dist.StudentT(DEGREES, slope * x, WIDTH), obs=y)


def truth(*statements):
    """The density of the Euler path and of readings `(y, slope, weight)`."""

    def of(b):
        def step(h, x, z):
            return normal(z, x + h * pull(x, b), SCALE * np.sqrt(h))

        def readings(path):
            total = 0.0
            for y, slope, weight in statements:
                residual = np.asarray(y, float) - slope * path
                terms = scipy.stats.t.logpdf(residual / WIDTH, DEGREES) - np.log(WIDTH)
                total = total + weight * np.where(np.isnan(residual), 0.0, terms).sum(-1)
            return total

        steps = [partial(step, h) for h in np.diff(TIMES)]
        return GridTruth(lambda x: normal(x, 0.0, START), steps, readings)

    return of


@case("plain", truth((Y, 1.0, 1.0)))
def _():
    seen(wells(level()), Y)


GAPS = np.array([NAN, -0.2, 0.5])


@case("two instruments, missing in part", truth((GAPS, 1.0, 1.0), (Y, 2.0, 1.0)))
def _():
    x = wells(level())
    seen(x, GAPS)
    seen(x, Y, "z", slope=2.0)


@case("transformed", truth((Y, 2.0, 1.0)), refusal="transform|value", leaves_latent=True)
def _():
    seen(2.0 * wells(level()), Y)


@case(
    "plate of instruments",
    truth((Y, 1.0, 1.0), (0.5 * Y, 1.0, 1.0)),
    refusal="plate|instrument|replicate",
)
def _():
    x = wells(level())
    with numpyro.plate("gauges", 2):
        seen(x, jnp.stack([Y, 0.5 * Y]))


@case("scale around observe", truth((Y, 1.0, 0.5)), refusal="scale")
def _():
    x = wells(level())
    with handlers.scale(scale=0.5):
        seen(x, Y)
