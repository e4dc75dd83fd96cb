"""Models and fits at the top of a module, as other processes want them."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import BarkerMH

import numpyro_sde as nsde


def series(number, length=6, seed=0):
    """Clocks and data of some Ornstein-Uhlenbeck processes around levels of their own."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.5, size=(number, length)) + 0.05, axis=1)
    level = rng.normal(size=number)
    return {"times": nsde.TimeGrid(times), "y": level[:, None] + rng.normal(size=times.shape)}


def path_model(times, y=None):
    level = numpyro.sample("level", dist.Normal(0.0, 2.0))
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, level, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(level, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)


marginal = nsde.handlers.marginalize(path_model, method=nsde.filters.Kalman())
short_chain = nsde.Chain(partial(BarkerMH), num_warmup=20, num_samples=30)


def moments(key, model, data):
    """A fit without compiling: 20 draws around the data's mean."""
    if not np.isfinite(data["y"]).all():
        raise ValueError("data are not finite")
    return {"level": data["y"].mean() + 0.1 * np.asarray(jax.random.normal(key, (20,)))}


def moments_noted(key, model, data, folder):
    """The same, leaving a trace of every call."""
    with (Path(folder) / f"{os.getpid()}").open("a") as file:
        file.write(f"{data['y'][0]!r}\n")
    time.sleep(0.05)
    return moments(key, model, data)


def kill_after(key, model, data, folder, when):
    """The same, but the process ends without a word before the series whose datum is `when`."""
    if data["y"][0] == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return moments_noted(key, model, data, folder)
