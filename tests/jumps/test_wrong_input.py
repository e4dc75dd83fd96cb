"""What a model of jumps cannot mean is an error that names the argument, or NaN inside a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import numpyro_sde as nsde

TIMES = np.arange(4.0)


def states_of(rates, init="stationary"):
    return nsde.JumpPath(nsde.MarkovJumpProcess(rates, 3), TIMES, init)


def test_negative_rates():
    rates = np.ones((3, 3))
    rates[0, 2] = -0.5
    with pytest.raises(ValueError, match=r"rates must be finite and not negative, got -0\.5"):
        states_of(rates)
    with pytest.raises(ValueError, match=r"rates must be finite and not negative, got -0\.5"):
        nsde.MarkovJumpProcess(lambda p: p * jnp.array(rates), 3, params=1.0)

    def value(scale):
        chain = nsde.MarkovJumpProcess(lambda p: p * jnp.ones((3, 3)), 3, params=scale)
        return nsde.JumpPath(chain, TIMES, 0).log_prob(jnp.array([0, 1, 1, 2]))

    assert np.isfinite(jax.jit(value)(0.5))
    assert np.isnan(jax.jit(value)(-0.5))
    with pytest.raises(ValueError, match="finite and not negative"):
        nsde.ReactionNetwork([[1]], [[0]], jnp.array([-1.0]))


def test_reducible_chains_have_no_stationary_start():
    absorbing = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"no single stationary law.*init|init.*stationary"):
        states_of(absorbing)
    assert np.isfinite(float(states_of(absorbing, 0).log_prob(jnp.array([0, 1, 2, 2]))))
    switch = nsde.MarkovJumpProcess(jnp.ones(1), 2, edges=[(0, 1)])
    with pytest.raises(ValueError, match="stationary"):
        nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 1.0, switch)

    def value(rate):  # reducible where the rate is zero, known only inside the trace
        chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [rate, 0.0]]), 2)
        return nsde.JumpPath(chain, TIMES).log_prob(jnp.array([0, 1, 1, 1]))

    assert np.isfinite(jax.jit(value)(1.0))
    assert not np.isfinite(jax.jit(value)(0.0))


def leaping(size):
    return nsde.SDE(
        lambda t, x: -x, lambda t, x: 0.5, jumps=nsde.CompoundPoisson(1.0, size, max_per_step=16)
    )


def test_jump_sizes_without_a_density_of_their_sum():
    path = nsde.SDEPath(leaping(dist.Gamma(2.0, 1.0)), TIMES, 0.0)
    with pytest.raises(
        (TypeError, ValueError), match="jumps of size Gamma have no transition density"
    ):
        path.log_prob(jnp.array([0.0, 1.0, 0.5, 0.2]))

    def model(x):
        numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        numpyro.sample("x", path, obs=x)

    with pytest.raises((TypeError, ValueError), match=r"Gamma|density"):
        MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False).run(
            jax.random.key(0), np.array([0.0, 1.0, 0.5, 0.2])
        )
    drawn = path.sample(jax.random.key(0), (5,))
    assert np.all(np.isfinite(drawn))


def epidemic(accumulate, observed, y):
    net = nsde.ReactionNetwork(
        [[1, 0], [1, 1]],
        [[0, 0], [2, 0]],
        jnp.array([0.06, 0.6]),
        species=["S", "I"],
        reactions=["infection", "recovery"],
        accumulate=accumulate,
    )

    def model(y=None):
        x = numpyro.sample(
            "x", nsde.ReactionPath(net, TIMES, [27.0, 3.0], law=nsde.laws.EulerMultinomial())
        )
        nsde.observe("y", x, lambda t, x: dist.Poisson(observed(net, x) + 0.1), obs=y)

    marginal = nsde.handlers.marginalize(
        model, method=nsde.filters.Particle(50, proposal="bootstrap")
    )
    return log_density(numpyro.handlers.seed(marginal, 0), (y,), {}, {})[0]


@pytest.mark.slow
def test_incidence_without_an_accumulator():
    y = np.array([np.nan, 4.0, 5.0, 3.0])
    value = epidemic(["infection"], lambda net, x: net.of(x, "infection"), y)
    assert np.isfinite(value)
    with pytest.raises(ValueError, match=r"accumulate=\['infection'\]"):
        epidemic([], lambda net, x: net.of(x, "infection"), y)
