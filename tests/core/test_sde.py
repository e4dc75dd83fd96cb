"""The SDE: what it reads off its coefficients, and every kind of bad coefficient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde

TIMES = np.array([0.0, 0.1, 0.25, 0.5])
NORMAL = dist.Normal(0.0, 1.0)


def minus(t, x):
    return -x


def one(t, x):
    return 1.0


def vector(d):
    return dist.Normal(jnp.zeros(d), 1.0).to_event(1)


STRUCTURES = {
    "scalar": ((), one, "diagonal", ()),
    "scalar, several noises": ((), lambda t, x: jnp.ones(3), "diagonal", ()),
    "one number for all": ((2,), one, "diagonal", (2,)),
    "diagonal": ((2,), lambda t, x: jnp.ones(2), "diagonal", (2,)),
    "square": ((2,), lambda t, x: jnp.eye(2), "general", (2,)),
    "more noises": ((2,), lambda t, x: jnp.ones((2, 3)), "general", (2,)),
    "fewer noises": ((2,), lambda t, x: jnp.ones((2, 1)), "general", (1,)),
}


@pytest.mark.parametrize(
    ("state", "diffusion", "kind", "innovation"), STRUCTURES.values(), ids=STRUCTURES
)
def test_structure(state, diffusion, kind, innovation):
    structure = nsde.SDE(minus, diffusion).structure(state)
    assert structure.kind == kind
    assert structure.innovation_shape == innovation


def test_one_dimensional_vector_state_is_not_a_scalar():
    structure = nsde.SDE(minus, lambda t, x: jnp.ones(1)).structure((1,))
    assert structure == ((1,), "diagonal", (1,), (1,))


def test_noise_factor_is_a_factor_of_the_covariance(x64):
    rng = np.random.default_rng(0)
    for d, m in ((2, 2), (3, 5), (2, 1)):
        factor = rng.normal(size=(d, m))
        sde = nsde.SDE(lambda t, x, p: x, lambda t, x, p: p, params=factor, event_dims=2)
        root = sde.noise_factor_at(0.0, jnp.zeros(d))
        np.testing.assert_allclose(root @ root.T, factor @ factor.T, atol=1e-12)
        if m >= d:
            np.testing.assert_allclose(root, jnp.tril(root))
    many = nsde.SDE(minus, lambda t, x: jnp.array([3.0, -4.0]))
    np.testing.assert_allclose(many.noise_factor_at(0.0, 0.0), 5.0)


def test_stratonovich_drift_against_its_definition(x64):
    """1/2 sum_jk L_kj d_k L_ij by finite differences, for scalar, diagonal and general noise."""
    x = jnp.array([0.4, -0.7])

    def general(t, x):
        return jnp.stack([jnp.stack([x[0] * x[1], jnp.sin(x[1])]), jnp.stack([x[1] ** 2, x[0]])])

    for state, diffusion in (
        (x[0], lambda t, x: jnp.sin(x)),
        (x[0], lambda t, x: jnp.stack([jnp.sin(x), x**2])),
        (x, lambda t, x: jnp.stack([jnp.sin(x[0] * x[1]), x[0] ** 2])),
        (x, general),
    ):
        sde = nsde.SDE(minus, diffusion, interpretation="stratonovich")

        def columns(s, diffusion=diffusion, state=state):
            s = np.asarray(s).reshape(np.shape(state))
            value = np.asarray(diffusion(0.0, jnp.asarray(s)))
            if value.ndim > s.ndim:
                return value.reshape(max(s.size, 1), -1)
            return np.diag(np.atleast_1d(value))

        flat, step = np.atleast_1d(np.asarray(state)), 1e-6
        L = columns(flat)
        correction = np.zeros(flat.size)
        for k in range(flat.size):
            e = np.eye(flat.size)[k] * step
            dL = (columns(flat + e) - columns(flat - e)) / (2 * step)
            correction += 0.5 * (dL * L[k]).sum(-1)
        got = sde.ito_drift_at(0.0, state) - sde.drift_at(0.0, state)
        np.testing.assert_allclose(np.atleast_1d(got), correction, atol=1e-8)


def test_params_keep_their_structure_and_dtype():
    params = {"a": 1.0, "b": (2, [jnp.ones(3)]), "c": np.float32(0.5)}
    sde = nsde.SDE(lambda t, x, p: p["a"] * x, lambda t, x, p: p["b"][0], params=params)
    assert jax.tree.structure(sde.params) == jax.tree.structure(params)
    assert sde.batch_shape == (3,)


def test_event_dims_reach_nested_keys_and_whole_subtrees():
    params = {"a": {"m": jnp.ones((4, 2, 2)), "s": jnp.ones(4)}, "b": [jnp.ones(3), jnp.ones(5)]}
    sde = nsde.SDE(
        lambda t, x, p: x, lambda t, x, p: 1.0, params=params, event_dims={"a": {"m": 2}, "b": 1}
    )
    assert sde.batch_shape == (4,)
    whole = nsde.SDE(
        lambda t, x, p: x,
        lambda t, x, p: 1.0,
        params={"w": jnp.ones((7, 8, 9))},
        event_dims={"w": None},
    )
    assert whole.batch_shape == ()


class Network(eqx.Module):
    weights: jax.Array
    activation: object = eqx.field(default=jnp.tanh)

    def __call__(self, t, x):
        return self.activation(self.weights @ x)


def test_modules_as_params_and_as_coefficients():
    net = Network(jnp.full((2, 2), 0.3))
    as_params = nsde.SDE(lambda t, x, p: p["net"](t, x), one_with_params, params={"net": net})
    as_drift = nsde.SDE(net, one)
    x = jnp.array([0.5, -1.0])
    np.testing.assert_allclose(as_params.drift_at(0.0, x), net(0.0, x))
    np.testing.assert_allclose(as_drift.drift_at(0.0, x), net(0.0, x))
    assert as_params.batch_shape == as_drift.batch_shape == ()

    @eqx.filter_grad
    def gradient(net):
        return nsde.SDEPath(nsde.SDE(net, one), TIMES, vector(2)).log_prob(jnp.ones((4, 2)))

    assert bool(jnp.any(gradient(net).weights != 0))


def one_with_params(t, x, p):
    return 1.0


# -- errors ---------------------------------------------------------------------------------


def path(drift, diffusion, init=NORMAL, **kwargs):
    return nsde.SDEPath(nsde.SDE(drift, diffusion, **kwargs), TIMES, init)


SHAPES = {
    "drift too short": (
        lambda: path(lambda t, x: x[0], one, vector(2)),
        r"drift must return the shape of the state \(2,\), got \(\)",
    ),
    "drift too long": (
        lambda: path(lambda t, x: jnp.ones(3), one, vector(2)),
        r"drift must return the shape of the state \(2,\), got \(3,\)",
    ),
    "drift of a scalar": (
        lambda: path(lambda t, x: jnp.ones(2), one),
        r"drift must return the shape of the state \(\), got \(2,\)",
    ),
    "diffusion": (
        lambda: path(minus, lambda t, x: jnp.ones(3), vector(2)),
        r"diffusion must return a scalar, the shape of the state \(2,\), or \(2, 'm'\) for m "
        r"Brownian motions, got \(3,\)",
    ),
    "diffusion transposed": (
        lambda: path(minus, lambda t, x: jnp.ones((3, 2)), vector(2)),
        r"the shape of the state \(2,\), .* got \(3, 2\)",
    ),
    "no noise at all": (
        lambda: path(minus, lambda t, x: jnp.ones((2, 0)), vector(2)),
        r"the shape of the state \(2,\), .* got \(2, 0\)",
    ),
    "drift returns a tuple": (
        lambda: path(lambda t, x: (x[0], x[1]), one, vector(2)),
        r"drift must return one array, got tuple: use jnp.stack",
    ),
    "drift returns nothing": (
        lambda: path(lambda t, x: None, one),
        r"drift must return one array, got NoneType",
    ),
    "diffusion returns a dict": (
        lambda: path(minus, lambda t, x: {"scale": 1.0}),
        r"diffusion must return one array, got dict",
    ),
    "matrix without event_dims": (
        lambda: path(
            lambda t, x, p: p["A"] @ x, one_with_params, vector(2), params={"A": jnp.eye(2)}
        ),
        r"(?s)drift fails on a state of shape \(2,\).*params 'A' of shape \(2, 2\) are read as "
        r"batch dimensions; declare those of one process in event_dims",
    ),
    "vector without event_dims": (
        lambda: path(
            lambda t, x, p: -x, lambda t, x, p: p * jnp.ones(3), vector(2), params=jnp.ones(3)
        ),
        r"got \(3,\) \(leading dimensions of params '' of shape \(3,\) are read as batch",
    ),
    "batches that do not broadcast": (
        lambda: path(
            lambda t, x, p: -p["a"] * x,
            lambda t, x, p: p["b"],
            params={"a": jnp.ones(3), "b": jnp.ones(2)},
        ),
        r"batch shape \(2,\) of b does not broadcast with \(3,\) of a",
    ),
    "init and params": (
        lambda: path(
            lambda t, x, p: -p * x,
            one_with_params,
            dist.Normal(jnp.zeros(4), 1.0),
            params=jnp.ones(3),
        ),
        r"batch shape \(4,\) of init does not broadcast with \(3,\) of params of the SDE",
    ),
    "init of rank 2": (
        lambda: path(minus, one, dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2)),
        r"init must have event shape \(\) or \(d,\), got \(2, 2\)",
    ),
    "fixed init of rank 2": (
        lambda: path(minus, one, jnp.zeros((3, 2))),
        r"init must have event shape \(\) or \(d,\), got \(3, 2\)",
    ),
    "interpretation": (
        lambda: nsde.SDE(minus, one, interpretation="backward"),
        r"interpretation must be 'ito' or 'stratonovich', got 'backward'",
    ),
    "unknown event_dims": (
        lambda: nsde.SDE(
            lambda t, x, p: x, one_with_params, params={"a": 1.0}, event_dims={"b": 1}
        ),
        r"event_dims names 'b', which is not in params \(it has \['a'\]\)",
    ),
    "event_dims without params": (
        lambda: nsde.SDE(minus, one, event_dims={"b": 1}),
        r"event_dims names \['b'\] but params has no keys",
    ),
    "event_dims too many": (
        lambda: nsde.SDE(
            lambda t, x, p: x, one_with_params, params={"a": jnp.ones(3)}, event_dims={"a": 2}
        ),
        r"event_dims of params\['a'\] is 2 but the array has shape \(3,\)",
    ),
    "event_dims negative": (
        lambda: nsde.SDE(
            lambda t, x, p: x, one_with_params, params={"a": jnp.ones(3)}, event_dims={"a": -1}
        ),
        r"event_dims must be >= 0, got -1",
    ),
}


@pytest.mark.parametrize(("make", "message"), SHAPES.values(), ids=SHAPES)
def test_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


KINDS = {
    "drift takes too few": (
        lambda: nsde.SDE(lambda x: x, one),
        r"drift must take \(t, x\) because params was not given, got a function of \(x\)",
    ),
    "drift takes p without params": (
        lambda: nsde.SDE(lambda t, x, p: x, one),
        r"drift must take \(t, x\) because params was not given, got a function of \(t, x, p\)",
    ),
    "drift takes no p with params": (
        lambda: nsde.SDE(minus, one_with_params, params={"a": 1.0}),
        r"drift must take \(t, x, p\) because params was given, got a function of \(t, x\)",
    ),
    "diffusion takes no p with params": (
        lambda: nsde.SDE(lambda t, x, p: x, one, params={"a": 1.0}),
        r"diffusion must take \(t, x, p\) because params was given",
    ),
    "drift is a number": (
        lambda: nsde.SDE(1.0, one),
        r"drift must be a function of \(t, x\), got float",
    ),
    "diffusion is a number": (
        lambda: nsde.SDE(minus, 0.5),
        r"diffusion must be a function of \(t, x\), got float",
    ),
    "a function among params": (
        lambda: nsde.SDE(lambda t, x, p: x, one_with_params, params={"f": jnp.sin}),
        r"params\['f'\] must be an array or a number, got .*; functions belong in drift",
    ),
    "a string among params": (
        lambda: nsde.SDE(lambda t, x, p: x, one_with_params, params={"f": "fast"}),
        r"params\['f'\] must be an array or a number, got str",
    ),
    "event_dims is a string": (
        lambda: nsde.SDE(lambda t, x, p: x, one_with_params, params={"a": 1.0}, event_dims="a"),
        r"event_dims must be an int or a mapping from keys of params to ints, got str",
    ),
    "event_dims of a wrong kind": (
        lambda: nsde.SDE(
            lambda t, x, p: x, one_with_params, params={"a": 1.0}, event_dims={"a": 1.5}
        ),
        r"event_dims\['a'\] must be an int, got float",
    ),
    "noise": (
        lambda: nsde.SDE(minus, one, noise="white"),
        r"noise must be a driving noise such as nsde.noise.Brownian\(\), got str",
    ),
    "noise class": (
        lambda: nsde.SDE(minus, one, noise=nsde.noise.Brownian),
        r"noise must be a driving noise such as nsde.noise.Brownian\(\), got",
    ),
    "sde": (
        lambda: nsde.SDEPath(minus, TIMES, NORMAL),
        r"sde must be an nsde.SDE, got function",
    ),
    "sde class": (
        lambda: nsde.SDEPath(nsde.processes.OrnsteinUhlenbeck, TIMES, NORMAL),
        r"sde must be an nsde.SDE",
    ),
    "scheme class": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, NORMAL, scheme=nsde.schemes.Euler),
        r"scheme must be one of nsde.schemes, got .*Euler.*; call it, scheme=Euler\(\)",
    ),
    "scheme class by its own name": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, NORMAL, scheme=nsde.schemes.Milstein),
        r"call it, scheme=Milstein\(\)",
    ),
    "scheme name": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, NORMAL, scheme="euler"),
        r"scheme must be one of nsde.schemes, got 'euler'",
    ),
    "exact without a law": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, NORMAL, scheme=nsde.schemes.Exact()),
        r"scheme=Exact\(\) needs a process with a known transition law; SDE has none",
    ),
    "init is a string": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, "stationary"),
        r"init must be a NumPyro distribution over the first state, or one fixed state, got str",
    ),
    "init is a function": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, lambda: 0.0),
        r"init must be a NumPyro distribution .* got function",
    ),
    "init is None": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, None),
        r"init must be a NumPyro distribution .* got NoneType",
    ),
    "init is a class": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, dist.Normal),
        r"init must be a NumPyro distribution .* got (type|DistributionMeta)",
    ),
    "init is discrete": (
        lambda: nsde.SDEPath(nsde.SDE(minus, one), TIMES, dist.Poisson(3.0)),
        r"init must be a continuous distribution, got Poisson",
    ),
}


@pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
def test_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_non_finite_fixed_start_is_refused():
    with pytest.raises(ValueError, match="init must be finite, got nan"):
        path(minus, one, np.nan)
