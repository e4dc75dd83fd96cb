"""What observe refuses, and in which words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from observing import NAN, PAIRS, PATH, TIMES, scalar_sde, site

import numpyro_sde as nsde


def normal(t, x):
    return dist.Normal(x, 0.1)


def normal_of_first(t, x):
    return dist.Normal(x[0], 0.1)


VALUES = {
    "data longer than the path": (
        lambda: site(normal, np.zeros(7)),
        r"observe\('y'\): obs has shape \(7,\), but the path gives observations of shape \(5,\) "
        r"\(5 times\)",
    ),
    "data shorter than the path": (
        lambda: site(normal, np.zeros(3)),
        r"obs has shape \(3,\), but the path gives observations of shape \(5,\) \(5 times\)",
    ),
    "one number": (
        lambda: site(normal, 0.3),
        r"obs has shape \(\), but the path gives observations of shape \(5,\)",
    ),
    "data of another dimension": (
        lambda: site(normal_of_first, np.zeros((5, 2)), PAIRS),
        r"obs has shape \(5, 2\), but the path gives observations of shape \(5,\)",
    ),
    "scalar data of a vector": (
        lambda: site(normal, np.zeros(5), PAIRS),
        r"obs has shape \(5,\), but the path gives observations of shape \(5, 2\)",
    ),
    "data transposed": (
        lambda: site(normal, np.zeros((2, 5)), PAIRS),
        r"obs has shape \(2, 5\), but the path gives observations of shape \(5, 2\)",
    ),
    "data of more series": (
        lambda: site(normal, np.zeros((4, 5)), np.stack([PATH] * 3), np.stack([TIMES] * 3)),
        r"obs has shape \(4, 5\), whose leading dimensions \(4,\) do not fit the batch shape "
        r"\(3,\) of the path",
    ),
    "data longer than at": (
        lambda: site(normal, np.zeros(5), at=[0, 1]),
        r"obs has shape \(5,\), but the path gives observations of shape \(2,\) \(2 times\)",
    ),
    "at beyond the path": (
        lambda: site(normal, at=[0, 5]),
        r"observe\('y'\): at must lie in 0\.\.4 for a path of 5 times, got 0\.\.5",
    ),
    "at before the path": (
        lambda: site(normal, at=[-6]),
        r"at must lie in 0\.\.4 for a path of 5 times, got -6\.\.-6",
    ),
    "at is a mask": (
        lambda: site(normal, at=np.ones(5, bool)),
        r"at must be a list of integer indices into the path, got dtype bool and shape \(5,\)",
    ),
    "at holds times": (
        lambda: site(normal, at=[0.0, 0.5]),
        r"at must be a list of integer indices into the path, got dtype float64",
    ),
    "at is one index": (
        lambda: site(normal, at=3),
        r"at must be a list of integer indices into the path, got dtype int64 and shape \(\)",
    ),
    "inputs too long": (
        lambda: site(lambda t, x, u: dist.Normal(x, u), inputs=np.ones(7)),
        r"inputs must have shape \(5, \.\.\.\).* one entry for each observation time, got \(7,\)",
    ),
    "inputs without times": (
        lambda: site(lambda t, x, u: dist.Normal(x, u), inputs=0.3),
        r"inputs must have shape \(5, \.\.\.\).* got \(\)",
    ),
    "inputs at all times, data at some": (
        lambda: site(lambda t, x, u: dist.Normal(x, u), inputs=np.ones(5), at=[0, 1]),
        r"inputs must have shape \(2, \.\.\.\).* got \(5,\)",
    ),
    "unknown event_dims": (
        lambda: site(
            lambda t, x, p: dist.Normal(x, p["s"]), params={"s": 1.0}, event_dims={"r": 1}
        ),
        r"event_dims names 'r', which is not in params of observe \(it has \['s'\]\)",
    ),
    "matrix without event_dims": (
        lambda: site(
            lambda t, x, p: dist.MultivariateNormal(p["H"] @ x, jnp.eye(2)),
            None,
            PAIRS,
            params={"H": jnp.eye(2)},
        ),
        r"(?s)emission fails on a state of shape \(2,\).*params 'H' of shape \(2, 2\) are read as "
        r"batch dimensions; declare those of one process in event_dims",
    ),
    "params that do not broadcast": (
        lambda: site(
            lambda t, x, p: dist.Normal(x, p),
            None,
            np.stack([PATH] * 3),
            np.stack([TIMES] * 3),
            params=jnp.ones(4),
        ),
        r"batch shape \(4,\) of params and inputs of observe does not broadcast with \(3,\)",
    ),
    "a part of an observation that has no marginal": (
        lambda: site(
            lambda t, x: dist.Dirichlet(jnp.ones(3)),
            np.where(np.arange(15).reshape(5, 3) == 4, NAN, 1 / 3),
        ),
        r"obs is missing in part at some times, but a component of Dirichlet cannot be integrated "
        r"out",
    ),
    "times of another length": (
        lambda: site(normal, times=TIMES, x_of=lambda x: x[:4]),
        r"x of shape \(4,\) is not the value of an SDEPath site, and no path would fit it",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_value_errors(case):
    make, message = VALUES[case]
    with pytest.raises(ValueError, match=message):
        make()


TYPES = {
    "returns the mean": (
        lambda: site(lambda t, x: 2 * x),
        r"emission must return a NumPyro distribution for one time, got .* from a state of shape "
        r"\(\)",
    ),
    "returns nothing": (
        lambda: site(lambda t, x: None),
        r"emission must return a NumPyro distribution for one time, got NoneType",
    ),
    "returns a class": (
        lambda: site(lambda t, x: dist.Normal),
        r"emission must return a NumPyro distribution for one time, got DistributionMeta",
    ),
    "returns a tuple": (
        lambda: site(lambda t, x: (dist.Normal(x, 1.0),), None, PAIRS),
        r"got tuple from a state of shape \(2,\)",
    ),
    "is a distribution": (
        lambda: site(dist.Normal(0.0, 1.0)),
        r"emission must be a function of \(t, x\) that returns a distribution, got Normal itself",
    ),
    "is a class of distributions": (
        lambda: site(dist.Normal),
        r"emission must be a function of \(t, x\) that returns a distribution, got Normal itself",
    ),
    "takes too few": (
        lambda: site(lambda x: dist.Normal(x, 1.0)),
        r"emission must take \(t, x\) because params was not given and inputs was not given, got "
        r"a function of \(x\)",
    ),
    "takes no inputs": (
        lambda: site(normal, inputs=np.ones(5)),
        r"emission must take \(t, x, u\) because params was not given and inputs was given",
    ),
    "takes no params": (
        lambda: site(normal, params={"a": 1.0}),
        r"emission must take \(t, x, p\) because params was given and inputs was not given",
    ),
    "takes only params, both given": (
        lambda: site(lambda t, x, p: dist.Normal(x, p), params=1.0, inputs=np.ones(5)),
        r"emission must take \(t, x, p, u\) because params was given and inputs was given",
    ),
    "a function among params": (
        lambda: site(lambda t, x, p: dist.Normal(x, 1.0), params={"f": jnp.sin}),
        r"params of observe\['f'\] must be an array or a number",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_type_errors(case):
    make, message = TYPES[case]
    with pytest.raises(TypeError, match=message):
        make()


def test_traced_at_is_refused():
    with pytest.raises(TypeError, match=r"observe\('y'\): at must be known before tracing"):
        jax.jit(lambda at: site(normal, at=at)["value"])(jnp.arange(2))


def closing_over(array):
    class Holder:
        def __init__(self):
            self.array = array

    holder = Holder()

    def helper(x):
        return array * x

    return {
        "closure": lambda t, x: dist.Normal(array * x, 1.0).to_event(1),
        "nested": lambda t, x: dist.Normal(helper(x), 1.0).to_event(1),
        "default": lambda t, x, array=array: dist.Normal(array * x, 1.0).to_event(1),
        "partial": functools.partial(lambda a, t, x: dist.Normal(a * x, 1.0).to_event(1), array),
        "object": lambda t, x: dist.Normal(holder.array * x, 1.0).to_event(1),
    }


@pytest.mark.parametrize("how", closing_over(None))
def test_emissions_that_close_over_arrays_in_a_plate_are_refused(how):
    """Plate and state have the same size: nothing else would notice."""

    def model():
        array = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("series", 2):
            init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
            x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES, init=init))
            nsde.observe("y", x, closing_over(array)[how])

    with pytest.raises(
        ValueError, match=r"emission closes over .* of shape \(2,\) in plate 'series' of size 2"
    ):
        handlers.seed(model, 0)()
