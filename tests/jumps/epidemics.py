"""Two published epidemics as models: influenza in a boarding school, cholera in Dacca."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jumps.references import REFERENCE

import numpyro_sde as nsde
from numpyro_sde import laws

BSFLU, DACCA = REFERENCE["bsflu"], REFERENCE["dacca"]
FLU = nsde.datasets.load_boarding_school_flu()
CHOLERA = nsde.datasets.load_dacca_cholera()


def flu_path(beta, progress, *, steps_a_day=12):
    """Susceptible, infectious, confined; Euler-multinomial steps of two hours."""
    net = nsde.ReactionNetwork(
        reactants=[[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        products=[[0, 0, 0], [2, 0, 0], [0, 1, 0]],
        rates=jnp.stack([beta / 763, progress, jnp.asarray(BSFLU["mu_R1"])]),
        species=["S", "I", "R1"],
        reactions=["infection", "progress", "recovery"],
    )
    return nsde.ReactionPath(
        net, np.arange(15.0), [762.0, 1.0, 0.0], law=laws.EulerMultinomial(steps_a_day)
    )


def flu(confined=None):
    """The model of the lesson: rates in 1/day, Poisson counts of those confined."""
    beta = numpyro.sample("beta", dist.LogNormal(1.0, 0.5))
    progress = numpyro.sample("progress", dist.LogNormal(0.5, 0.5))
    rho = numpyro.sample("rho", dist.Uniform(0.3, 1.0))
    x = numpyro.sample("x", flu_path(beta, progress))
    nsde.observe(
        "confined",
        x,
        lambda t, x, p: dist.Poisson(p * x[2] + 1e-6),
        params=rho,
        obs=None if confined is None else np.append(np.nan, confined),
    )


# King et al. (2008), as the default parameters of pomp's dacca().
SEASONS = np.array([0.747, 6.38, -3.44, 4.23, 3.33, 4.55])
RESERVOIR = np.log([0.184, 0.0786, 0.0584, 0.00917, 0.000208, 0.0124])
GAMMA, EPSILON, MORTALITY, TREND = 20.8, 19.1, 0.06, -0.00498
SIGMA, TAU, DELTA = 3.13, 0.23, 0.02
START = np.array([0.621, 0.378, 0.000843, 0.000972, 1.16e-07])
STEPS = 20  # a month: steps of 1/240 of a year


def seasonal_basis(times):
    """Six periodic cubic B-splines of period one year, `(T, 6)`."""
    place = (times[:, None] % 1.0) * 6 - np.arange(6) + 1.5
    u = np.stack([place - 6, place, place + 6])
    cubes = [np.clip(u - k, 0.0, None) ** 3 for k in range(5)]
    return ((cubes[0] - 4 * cubes[1] + 6 * cubes[2] - 4 * cubes[3] + cubes[4]) / 6).sum(0)


class WithFloor(dist.Distribution):
    """A law whose density is nowhere below `floor`, as the published likelihood has it."""

    support = dist.constraints.real
    pytree_data_fields = ("base",)
    pytree_aux_fields = ("floor",)

    def __init__(self, base, floor):
        self.base, self.floor = base, floor
        super().__init__(base.batch_shape)

    def sample(self, key, sample_shape=()):
        return self.base.sample(key, sample_shape)

    def log_prob(self, value):
        return jnp.logaddexp(self.base.log_prob(value), np.log(self.floor))


def cholera_law(num_months):
    """The path of five compartments and the month's deaths, and the data."""
    months = CHOLERA.knots[: num_months + 1]
    fine = 1891.0 + np.arange(STEPS * num_months + 1) / (12.0 * STEPS)
    grid = nsde.TimeGrid(fine, 1.0)
    basis = seasonal_basis(fine)
    columns = [
        fine - 1916.08,
        np.interp(fine, CHOLERA.knots, CHOLERA.growth),
        np.interp(fine, CHOLERA.knots, CHOLERA.population),
        basis @ SEASONS,
        basis @ RESERVOIR,
    ]
    known = nsde.Input(fine, np.stack(columns, axis=1), order="hold")

    def infections(x, u):
        trend, _, pop, season, reservoir = u["known"]
        beta = jnp.exp(TREND * trend + season)
        return (jnp.exp(reservoir) + beta * x[1] / pop) * x[0]

    def drift(t, x, p, u):
        S, infected, *stages = x
        _, growth, pop, _, _ = u["known"]
        new, leave = infections(x, u), 3 * EPSILON
        return jnp.stack(
            [
                growth + DELTA * pop - new - DELTA * S + leave * stages[2],
                new - (MORTALITY + DELTA + GAMMA) * infected,
                GAMMA * infected - (leave + DELTA) * stages[0],
                leave * (stages[0] - stages[1]) - DELTA * stages[1],
                leave * (stages[1] - stages[2]) - DELTA * stages[2],
            ]
        )

    def diffusion(t, x, p, u):
        noise = SIGMA * x[0] * x[1] / u["known"][2]
        return jnp.stack([-noise, noise, 0.0 * noise, 0.0 * noise, 0.0 * noise])[:, None]

    sde = nsde.SDE(drift, diffusion, params={}, inputs={"known": known})
    wide = nsde.accumulate(sde, {"deaths": lambda t, x, p, u: MORTALITY * x[1]}, since=months[:-1])
    start = CHOLERA.population[0] * START / START.sum()
    path = wide.path(grid, start, scheme=nsde.schemes.Euler())
    return path, wide, CHOLERA.deaths[:num_months]


def reported(deaths):
    return WithFloor(dist.Normal(deaths, TAU * deaths + 1e-18), 1e-18)
