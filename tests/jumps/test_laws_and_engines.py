"""Every law of a path under every engine: taken, or refused by the name of what takes it."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.gibbs import Gibbs
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde import filters, infer, laws, reparam

TIMES, Y = 0.5 * np.arange(4), np.array([0.2, 1.1, 0.7, 0.3])
START = dist.Normal(0.0, 1.0)


def chain():
    return nsde.MarkovJumpProcess(np.array([[0.0, 0.6], [1.0, 0.0]]), 2)


def network(law):
    net = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
    return nsde.ReactionPath(net, TIMES, [2.0], law=law)


def jumping():
    return nsde.SDE(
        lambda t, x: -x, lambda t, x: 0.5, jumps=nsde.CompoundPoisson(1.0, dist.Normal(0.0, 1.0))
    )


def fractional():
    return nsde.SDE(lambda t, x: -x, lambda t, x: 1.0).driven_by(nsde.noise.MarkovFBM(0.3))


def switching():
    return nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.5 + r, chain())


LAWS = {
    "linear": lambda: nsde.SDEPath(nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0), TIMES, START),
    "nonlinear": lambda: nsde.SDEPath(nsde.processes.DoubleWell(1.0, 1.0, 1.0), TIMES, START),
    "fractional": lambda: nsde.SDEPath(fractional(), TIMES, START),
    "jump-diffusion": lambda: nsde.SDEPath(jumping(), TIMES, START),
    "switching": lambda: nsde.SDEPath(switching(), TIMES, START),
    "chain": lambda: nsde.JumpPath(chain(), TIMES),
    "network, jumps": lambda: network(laws.Jump()),
    "network, multinomial": lambda: network(laws.EulerMultinomial()),
    "network, closure": lambda: network(laws.MomentClosure()),
}
PARTICLES = ("auto", "bootstrap", "auxiliary")
GUIDED = ("guided", "defensive", "modified_bridge", "residual_bridge")
FILTERS = {
    "Kalman": filters.Kalman(),
    "ExtendedKalman": filters.ExtendedKalman(),
    "UnscentedKalman": filters.UnscentedKalman(),
    "EnsembleKalman": filters.EnsembleKalman(20),
    "MomentMatching": filters.MomentMatching(),
    "Forward": filters.Forward(bounds=(3,)),
    "IMM": filters.IMM(),
    "GPB": filters.GPB(2),
    "RaoBlackwell": filters.RaoBlackwell(4),
    **{f"Particle {p}": filters.Particle(8, proposal=p) for p in (*PARTICLES, *GUIDED)},
}
GAUSSIAN = {"ExtendedKalman", "UnscentedKalman", "EnsembleKalman"}
ANY = {f"Particle {p}" for p in PARTICLES}
ALL_PARTICLES = ANY | {f"Particle {p}" for p in GUIDED}
WHITE = {"InnovationReparam", "GuidedReparam", "AutoPathGuide"}
DENSITIES = {"filter_additive", "two_filter"}
# What takes each law; everything else must refuse it and name one of the words after it.
TAKEN = {
    "linear": (
        {"Kalman", "MomentMatching", "BridgeReparam", "ParticleGibbs"}
        | GAUSSIAN | ALL_PARTICLES | WHITE | DENSITIES,
        r"Kalman\(\)|Particle|smooth",
    ),
    "nonlinear": (
        {"MomentMatching", "BridgeReparam", "ParticleGibbs"}
        | GAUSSIAN | ALL_PARTICLES | WHITE | DENSITIES,
        r"ExtendedKalman\(\)|Particle|smooth",
    ),
    "fractional": (
        {"Kalman"} | GAUSSIAN | ALL_PARTICLES | WHITE,
        r"ExtendedKalman\(\)|Kalman\(\)|Particle|GuidedReparam|smooth",
    ),
    "jump-diffusion": (
        ANY | {"Particle guided", "ParticleGibbs"},
        r"Particle\(proposal='bootstrap'\)|smooth|JumpMixture",
    ),
    "switching": (
        {"IMM", "GPB", "RaoBlackwell", "ParticleGibbs"} | ANY | {"regime_law"},
        r"IMM\(\)|RaoBlackwell|smooth|Particle\(proposal='bootstrap'\)",
    ),
    "chain": (
        {"Forward", "ConditionalForward", "at_jumps", "ParticleGibbs"} | ANY,
        r"Forward\(\)|ConditionalForward|smooth",
    ),
    "network, jumps": (
        {"Forward"} | ANY,
        r"Particle\(proposal='bootstrap'\)|Forward\(bounds|smooth|proposal='bootstrap'",
    ),
    "network, multinomial": (
        ANY,
        r"Particle\(proposal='bootstrap'\)|smooth|proposal='bootstrap'",
    ),
    "network, closure": (
        {"MomentMatching"},
        r"MomentMatching\(\)|approximate|smooth",
    ),
}  # fmt: skip
ENGINES = [
    *FILTERS,
    "InnovationReparam",
    "GuidedReparam",
    "BridgeReparam",
    "filter_additive",
    "two_filter",
    "at_jumps",
    "regime_law",
    "AutoPathGuide",
    "ParticleGibbs",
    "ConditionalForward",
]


def seen(law):
    if law.startswith("network"):
        return lambda t, x: dist.Normal(x[0], 0.5)
    return lambda t, x: dist.Normal(x, 0.5)


def model(law, y=None):
    numpyro.sample("b", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", LAWS[law]())
    nsde.observe("y", x, seen(law), obs=y)


def points(law, known):
    return known[:, None] if law.startswith("network") else known


def guide_starts(law):
    guide = nsde.guides.AutoPathGuide(model)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    return svi.init(jax.random.key(0), law, Y)


def block_starts(law, kernel):
    """The first state of a Gibbs sampler, which draws the path once."""
    return kernel.init(jax.random.key(0), 1, None, (law, Y), {})


def ask(engine, law):
    """Have an engine look at a law; filters and reparametrisations by tracing alone."""
    if engine in FILTERS:
        treated = nsde.handlers.marginalize(model, method=FILTERS[engine])
    elif engine == "BridgeReparam":
        known = points(law, np.array([0.1, np.nan, 0.4, 0.2]))
        treated = handlers.reparam(model, config={"x": reparam.BridgeReparam(known)})
    elif engine.endswith("Reparam"):
        treated = handlers.reparam(model, config={"x": getattr(reparam, engine)()})
    else:
        others[engine](law)
        return

    def value(b):
        return log_density(handlers.seed(treated, 0), (law, Y), {}, {"b": b})[0]

    assert jax.eval_shape(value, jnp.zeros(())).shape == ()


def of_particles(name):
    def run(law):
        method = filters.Particle(8, proposal="bootstrap")
        extra = (lambda t, dt, x, x_next: dt * x[0],) if name == "filter_additive" else ()
        getattr(nsde, name)(LAWS[law](), seen(law), Y, *extra, method=method)

    return run


others = {
    "filter_additive": of_particles("filter_additive"),
    "two_filter": of_particles("two_filter"),
    "at_jumps": lambda law: nsde.smooth(
        model,
        {"b": np.zeros(2)},
        law,
        Y,
        method=filters.Forward(bounds=(3,)),
        rng_key=jax.random.key(0),
        at_jumps=True,
    ),
    "regime_law": lambda law: nsde.regime_law(LAWS[law](), points(law, Y)),
    "AutoPathGuide": guide_starts,
    "ParticleGibbs": lambda law: block_starts(law, infer.ParticleGibbs(model, num_particles=4)),
    "ConditionalForward": lambda law: block_starts(
        law, Gibbs([(infer.ConditionalForward(model), ["x"]), (NUTS(model), None)])
    ),
}
# Those that must compile to answer.
COSTLY = {"AutoPathGuide", "ParticleGibbs", "ConditionalForward", "two_filter", "filter_additive"}
COSTLY |= {"GuidedReparam", "Particle auto", "at_jumps", "regime_law"}


def pairs():
    for law, (taken, _) in TAKEN.items():
        for engine in ENGINES:
            slow = engine in COSTLY if engine in taken else engine == "ParticleGibbs"
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(law, engine, marks=marks, id=f"{law}-{engine}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("law", "engine"), list(pairs()))
def test_each_pair_is_taken_or_refused_by_name(law, engine):
    taken, names = TAKEN[law]
    if engine in taken:
        ask(engine, law)
        return
    with pytest.raises((ValueError, TypeError)) as refusal:
        ask(engine, law)
    assert re.search(names, str(refusal.value)), str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law for law in LAWS if law != "network, closure"])
def test_pmmh_takes_every_law_of_paths(law):
    """Each of them can be simulated: particles need no more."""
    mcmc = MCMC(infer.PMMH(model, num_particles=8), num_warmup=5, num_samples=5, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(jax.random.key(0), law, Y)
    assert np.all(np.isfinite(mcmc.get_samples()["b"]))


@pytest.mark.slow
@pytest.mark.parametrize("law", ["chain", "switching", "network, multinomial", "jump-diffusion"])
def test_particle_gibbs_by_ancestral_lines(law):
    kernel = infer.ParticleGibbs(model, num_particles=4, proposal="bootstrap", renewal="none")
    mcmc = MCMC(kernel, num_warmup=3, num_samples=3, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if law.startswith("network"):  # no density of the path, which NUTS would need
            with pytest.raises(TypeError, match="no transition density"):
                mcmc.run(jax.random.key(0), law, Y)
            return
        mcmc.run(jax.random.key(0), law, Y)
    x = mcmc.get_samples()["x"]
    assert x.shape == (3, 4)
    assert (x.dtype.kind == "i") == (law == "chain")


@pytest.mark.parametrize(
    ("handler", "law", "message"),
    [
        (lambda: nsde.handlers.discretize(model, nsde.schemes.Euler()), "chain", "are exact"),
        (lambda: nsde.handlers.drive(model, nsde.noise.MarkovFBM(0.3)), "chain", "are exact"),
        (lambda: nsde.handlers.drive(model, nsde.noise.MarkovFBM(0.3)), "switching", "Brownian"),
        (lambda: nsde.handlers.approximate(model, law=laws.Jump()), "chain", "ReactionNetwork"),
        (lambda: nsde.handlers.approximate(model, law=laws.Jump()), "switching", "Reaction"),
    ],
)
def test_handlers_that_change_a_law_refuse_what_they_cannot(handler, law, message):
    with pytest.raises(ValueError, match=message):
        handlers.trace(handlers.seed(handler(), 0)).get_trace(law, Y)


@pytest.mark.parametrize("law", ["chain", "switching", "network, jumps"])
def test_handlers_that_change_the_clock_take_them(law):
    for handler in (
        nsde.handlers.refine(model, max_step=0.25),
        nsde.handlers.extend(model, [2.0, 2.5]),
    ):
        sites = handlers.trace(handlers.seed(handler, 0)).get_trace(law)
        assert type(sites["x"]["fn"]) is type(LAWS[law]())
        assert sites["y"]["value"].shape == (4,)


def test_samplers_of_real_numbers_say_what_takes_discrete_states():
    kernel = infer.SplitNUTS(model)
    with pytest.raises(ValueError, match=r"method=filters\.Forward"):
        kernel.init(jax.random.key(0), 1, None, ("chain", Y), {})
