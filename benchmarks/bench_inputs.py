"""What an input costs: gradient of a linear system's exact log likelihood, with and without one.

Run: python benchmarks/bench_inputs.py. A heat-transfer model (Madsen and Holst 1995, "Estimation
of continuous-time models for the heat dynamics of a building": indoor air and a large medium that
stores heat, driven by the outdoor temperature), 500 hourly readings of the indoor temperature, all
rates inferred. The input changes at every reading, so that no two steps are alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import compiled, cpu_ms, report
from numpyro.infer.util import log_density

import numpyro_sde as nsde

HOURS = np.arange(500.0)
RNG = np.random.default_rng(0)
OUTDOORS = 5.0 + 4.0 * np.sin(2.0 * np.pi * HOURS / 24.0) + RNG.normal(size=HOURS.size)
INDOORS = 20.0 + np.cumsum(0.1 * RNG.normal(size=HOURS.size))
RATES = {"air": 0.3, "wall": 0.05, "leak": 0.02, "scale": 0.2, "noise": 0.1}


def house(order=None):
    """The model; `order` of the input, None for a constant outdoor temperature."""
    p = {
        name: numpyro.sample(name, dist.LogNormal(np.log(value), 0.3))
        for name, value in RATES.items()
    }

    def drift(t, x, p, outdoors):
        air = p["air"] * (x[1] - x[0]) + p["leak"] * (outdoors - x[0])
        return jnp.stack([air, p["wall"] * (x[0] - x[1])])

    if order is None:
        sde = nsde.SDE(lambda t, x, p: drift(t, x, p, 5.0), lambda t, x, p: p["scale"], params=p)
    else:
        sde = nsde.SDE(
            lambda t, x, p, u: drift(t, x, p, u["outdoors"]),
            lambda t, x, p, u: p["scale"],
            params=p,
            inputs={"outdoors": nsde.Input(HOURS, OUTDOORS, order=order)},
        )
    init = dist.Normal(jnp.full(2, 20.0), 1.0).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, HOURS, init))
    nsde.observe("y", x, lambda t, x, s: dist.Normal(x[0], s), params=p["noise"], obs=INDOORS)


def main() -> None:
    """Time one gradient of each."""
    values = {name: jnp.asarray(value) for name, value in RATES.items()}
    rows = []
    for name, order in (("no input", None), ("held input", "hold"), ("linear input", "linear")):
        model = nsde.handlers.marginalize(house, method=nsde.filters.Kalman())

        def value(p, model=model, order=order):
            return log_density(model, (order,), {}, p)[0]

        executable, seconds = compiled(jax.value_and_grad(value), values)
        rows.append((name, cpu_ms(executable, values), seconds))
    report("gradient of the log likelihood, 500 times, two states", rows)


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
