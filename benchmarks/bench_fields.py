"""Weights of a learned drift: integrated out, or sampled by NUTS; a step of SVI in a panel.

Run: python benchmarks/bench_fields.py [weights svi], both without arguments.

- weights: double well `4 (x - x^3)`, 2,000 points, `dt = 0.02`, 24 sines, amplitude, length and
  noise inferred, one chain: effective draws a CPU second, divergences, both posteriors compared.
  At a target of 0.99 NUTS over the weights is the reference that at 0.8 it is not.
- svi: a network drift shared by 50 series of 200 points, mini-batches of 10: a step of SVI beside
  the same arithmetic written out.
"""

import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import compiled, cpu_ms, report
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=2.5, num=24)
SITES = ("f/amplitude", "f/length", "scale")
EACH = 400  # draws of warm-up, and of a run


def well(t, x):
    return 4.0 * (x - x**3)


def model(x):
    f = PRIOR.register("f", amplitude=dist.HalfNormal(10.0), length=dist.InverseGamma(5.0, 5.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: p["f"](x), lambda t, x, p: p["s"], params={"f": f, "s": scale})
    numpyro.sample("x", nsde.SDEPath(sde, np.arange(len(x)) * 0.02, init=float(x[0])), obs=x)


def moments(draws):
    """Mean, standard deviation and their Monte Carlo errors, and the effective draws."""
    ess = float(effective_sample_size(draws[None]))
    square = (draws - draws.mean()) ** 2
    square_ess = float(effective_sample_size(square[None]))
    mean, sd = draws.mean(), draws.std()
    return mean, sd / ess**0.5, sd, square.std() / (2 * sd * square_ess**0.5), ess


def chain(name, model, x, more, accept=0.8):
    """CPU seconds to the first draws, warm-up and compilation included; then of more draws."""
    seconds = []
    for count in (EACH, EACH, more):  # the first with everything that is compiled once
        kernel = NUTS(model, target_accept_prob=accept)
        mcmc = MCMC(kernel, num_warmup=EACH, num_samples=count, progress_bar=False)
        began = time.process_time()
        mcmc.run(jax.random.key(1), x, extra_fields=("num_steps", "diverging"))
        draws = {site: np.asarray(mcmc.get_samples()[site]) for site in SITES}
        seconds.append(time.process_time() - began)
        if len(seconds) == 1:
            early = draws["f/amplitude"]
    extra = {key: np.asarray(value) for key, value in mcmc.get_extra_fields().items()}
    found = {site: moments(draws[site]) for site in SITES}
    # What a run costs whatever its length is in both of the last two.
    each = (seconds[2] - seconds[1]) / (more - EACH)
    print(f"{name}: {EACH} + {EACH} draws {seconds[0]:.1f} s, then {1e3 * each:.2f} ms a draw")
    steps, diverging = extra["num_steps"].mean(), extra["diverging"].sum()
    print(f"  {steps:.0f} steps a draw, {diverging} divergences in {more} draws")
    for site, (mean, error, sd, sd_error, ess) in found.items():
        print(
            f"  {site}: {mean:.3f} +- {error:.3f}, sd {sd:.3f} +- {sd_error:.3f}, "
            f"{ess / more:.2f} effective draws a draw"
        )
    ess = found["f/amplitude"][-1] / more
    first = float(effective_sample_size(early[None])) / seconds[0]
    return found, ess / each, first


def weights():
    steps = 20_000
    path = nsde.SDEPath(nsde.SDE(well, lambda t, x: 1.0), np.arange(steps + 1) * 0.002, init=1.0)
    x = np.array(path.sample(jax.random.key(0)))[::10][:2000]
    assert np.abs(x).max() < 2.5
    ours, our_rate, our_first = chain("collapsed", nsde.handlers.collapse(model, "f"), x, 20_000)
    # At NUTS's own target weights and amplitude are a funnel, whose neck it does not enter.
    for accept, draws in ((0.8, 4000), (0.99, 20_000)):
        name = f"weights, target {accept}"
        theirs, their_rate, their_first = chain(name, model, x, draws, accept)
        print(
            f"effective draws of the amplitude a CPU second: {our_rate / their_rate:.1f} times "
            f"while sampling, {our_first / their_first:.1f} times in the first run, compiled in it"
        )
        for site in SITES:
            (m, e, s, f, _), (m2, e2, s2, f2, _) = ours[site], theirs[site]
            print(
                f"  {site}: means {abs(m - m2) / np.hypot(e, e2):.1f} standard errors apart, "
                f"sds {abs(s - s2) / np.hypot(f, f2):.1f}"
            )


SERIES, BATCH, POINTS, STEP = 50, 10, 200, 0.05
TIMES = np.arange(POINTS) * STEP


def network():
    return eqx.nn.MLP("scalar", "scalar", 16, 1, jax.nn.tanh, key=jax.random.key(0))


def panel(x):
    f = nsde.fields.Network(network()).register("f")
    sde = nsde.SDE(lambda t, x, p: p(x) - x, lambda t, x, p: 0.5, params=f)
    with numpyro.plate("series", SERIES, subsample_size=BATCH) as rows:
        law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5))
        numpyro.sample("x", law, obs=jnp.asarray(x)[rows])


def by_hand(x, step_size):
    """Mean-field normal weights, one draw a step, Adam: start and step."""
    weights, static = eqx.partition(network(), eqx.is_inexact_array)
    leaves, treedef = jax.tree_util.tree_flatten(weights)
    sds = [
        dist.Normal(0.0, np.shape(leaf)[-1] ** -0.5 if leaf.ndim > 1 else fan**-0.5)
        for leaf, fan in zip(leaves, (1, 1, 16, 16), strict=True)
    ]
    optimizer = numpyro.optim.Adam(step_size)
    x = jnp.asarray(x)

    def loss(params, key):
        rows_key, key = jax.random.split(key)
        rows = jax.random.choice(rows_key, SERIES, (BATCH,), replace=False)
        values, total = [], 0.0
        for loc, log_scale, law in zip(*params, sds, strict=True):
            key, own = jax.random.split(key)
            q = dist.Normal(loc, jnp.exp(log_scale))
            value = q.sample(own)
            values.append(value)
            total += jnp.sum(law.log_prob(value) - q.log_prob(value))
        net = eqx.combine(jax.tree_util.tree_unflatten(treedef, values), static)
        batch = x[rows]
        mean = batch[:, :-1] + STEP * (jax.vmap(jax.vmap(net))(batch[:, :-1]) - batch[:, :-1])
        inside = dist.Normal(mean, 0.5 * STEP**0.5).log_prob(batch[:, 1:]).sum()
        start = dist.Normal(0.0, 0.5).log_prob(batch[:, 0]).sum()
        return -(total + SERIES / BATCH * (inside + start))

    def step(state, key):
        value, grads = jax.value_and_grad(loss)(optimizer.get_params(state), key)
        return optimizer.update(grads, state), value

    first = optimizer.init(
        ([jnp.zeros_like(a) for a in leaves], [jnp.full_like(a, np.log(0.1)) for a in leaves])
    )
    return first, step


def svi():
    """CPU time of 200 steps in one compiled loop, by SVI and by hand."""
    truth = nsde.SDE(lambda t, x: jnp.sin(2.0 * x) - x, lambda t, x: 0.5)
    law = nsde.SDEPath(truth, TIMES, dist.Normal(0.0, 0.5))
    x = np.array(law.sample(jax.random.key(0), (SERIES,)))
    fit = SVI(panel, AutoNormal(panel), numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = fit.init(jax.random.key(1), x)
    first, step = by_hand(x, 1e-3)

    def by_svi(state):
        return jax.lax.scan(lambda s, _: fit.update(s, x), state, None, 200)

    def written_out(state, key):
        return jax.lax.scan(step, state, jax.random.split(key, 200))

    rows = []
    for name, fn, args in (
        ("the arithmetic written out", written_out, (first, jax.random.key(2))),
        ("SVI", by_svi, (state,)),
    ):
        executable, seconds = compiled(fn, *args)
        rows.append((name, cpu_ms(executable, *args, repeats=15), seconds))
        print(f"{name}: last losses {np.mean(executable(*args)[1][-50:]):.1f}")
    report("200 steps of SVI, 10 of 50 series of 200 points", rows)


def main():
    nsde.configure_cpu()
    for name in sys.argv[1:] or ["weights", "svi"]:
        {"weights": weights, "svi": svi}[name]()


if __name__ == "__main__":
    main()
