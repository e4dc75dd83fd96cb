"""More ways to say a model than `numpyro_sde.testing` has: handlers, plates, bad data.

Each with the density that NumPyro's joint gives it, or with the words of its refusal.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

import numpyro_sde as nsde
from numpyro_sde.testing.quadratic import add_observations
from numpyro_sde.testing.ways import (
    M0,
    NAN,
    RATE,
    S0,
    SCALE,
    SD,
    TIMES,
    V0,
    W0,
    WAYS,
    Y2,
    Y3,
    YV,
    A,
    L,
    Way,
    Y,
    add_to,
    level,
    ou,
    ou_truth,
    seen,
    vector,
    vector_truth,
)

R = np.arange(3)
CASES: list[Way] = list(WAYS)
case = partial(add_to, CASES)


# ---------------------------------------------------------------- one path, one statement


@case("masked array", ou_truth({"y": [0.9, NAN, 0.5]}), refusal="mask")
def _():
    seen(ou(level()), np.ma.masked_equal([0.9, -999.0, 0.5], -999.0))


@case("data with None", ou_truth({"y": [0.9, NAN, 0.5]}), refusal="dtype|object")
def _():
    seen(ou(level()), np.array([0.9, None, 0.5], dtype=object))


@case("complex data", ou_truth({"y": Y}), refusal="dtype|complex", must_refuse=True)
def _():
    seen(ou(level()), Y + 0.5j)


@case("no times", ou_truth(), refusal="at")
def _():
    seen(ou(level()), np.zeros(0), at=[])


# ---------------------------------------------------------------- several statements, transforms


@case(
    "transformed",
    ou_truth({"y": Y, "slope": 2.0}),
    refusal="transform|value",
    leaves_latent=True,
)
def _():
    seen(2.0 * ou(level()), Y)


@case(
    "transformed by exp", ou_truth({"y": Y}), refusal="transform|value|affine", leaves_latent=True
)
def _():
    x = jnp.exp(ou(level()))
    nsde.observe("y", x, lambda t, v: dist.Normal(jnp.log(v), SD), obs=Y)


@case(
    "plain and transformed",
    ou_truth({"y": Y}, {"y": Y, "slope": 2.0}),
    refusal="transform|value|'z'",
)
def _():
    x = ou(level())
    seen(x, Y)
    seen(2.0 * x, Y, "z")


@case(
    "path in another density", ou_truth({"y": Y}, {"index": [2], "y": [0.4]}), refusal="value|'z'"
)
def _():
    x = ou(level())
    seen(x, Y)
    numpyro.sample("z", dist.Normal(x[..., -1], SD), obs=0.4)


@case("path in a factor", ou_truth({"y": Y}, {"index": [2], "y": [0.4]}), refusal="value|'z'")
def _():
    x = ou(level())
    seen(x, Y)
    numpyro.factor("z", dist.Normal(x[..., -1], SD).log_prob(0.4))


# ---------------------------------------------------------------- plates


@case("plate of instruments", ou_truth({"y": Y3}), refusal="plate|instrument|replicate")
def _():
    x = ou(level())
    with numpyro.plate("gauges", 3):
        seen(x, Y3)


@case(
    "plate of instruments, missing in part",
    ou_truth({"y": np.where(Y3 > 1.0, NAN, Y3)}),
    refusal="plate|instrument|replicate",
)
def _():
    x = ou(level())
    with numpyro.plate("gauges", 3):
        seen(x, np.where(Y3 > 1.0, NAN, Y3))


@case(
    "plate of instruments, own errors",
    ou_truth({"y": Y3, "sd": np.array([0.2, 0.3, 0.5])[:, None]}),
    refusal="plate|instrument|replicate",
)
def _():
    x = ou(level())
    with numpyro.plate("gauges", 3):
        errors = jnp.array([0.2, 0.3, 0.5])
        nsde.observe("y", x, lambda t, x, p: dist.Normal(x, p), params=errors, obs=Y3)


@case(
    "plates of series and instruments",
    ou_truth({"y": np.stack([Y2, 0.5 * Y2, 2.0 * Y2])}, paths=2),
    shape=(2, 3),
    refusal="plate|instrument|replicate",
)
def _():
    b = level()
    with numpyro.plate("series", 2, dim=-1):
        x = ou(b)
        with numpyro.plate("gauges", 3, dim=-2):
            seen(x, np.stack([Y2, 0.5 * Y2, 2.0 * Y2]))


@case("wide data", ou_truth({"y": Y3}), refusal="plate|shape|batch")
def _():
    seen(ou(level()), Y3)


@case("plate of times", ou_truth({"y": Y, "weight": 3.0}), refusal="plate|shape|batch")
def _():
    x = ou(level())
    with numpyro.plate("times", 3):
        seen(x, Y)


@case(
    "subsampled series",
    ou_truth({"y": Y2}, paths=2),
    shape=(2, 3),
    copies=2.0,
    refusal="plate 'series', which subsamples|subsample plates|do not support subsampling",
)
def _():
    b = level()
    with numpyro.plate("series", 4, subsample_size=2):
        seen(ou(b), Y2)


@case(
    "subsampled instruments",
    ou_truth({"y": Y2, "weight": 2.0}),
    refusal="plate|scale|instrument|replicate|do not support subsampling",
)
def _():
    x = ou(level())
    with numpyro.plate("gauges", 4, subsample_size=2):
        seen(x, Y2)


# ---------------------------------------------------------------- masks and scales

FLAGS = np.array([True, False])


@case("mask around observe", ou_truth({"y": [Y2[0], [NAN] * 3]}, paths=2), shape=(2, 3))
def _():
    b = level()
    with numpyro.plate("series", 2):
        x = ou(b)
        with handlers.mask(mask=FLAGS):
            seen(x, Y2)


@case(
    "mask around path",
    ou_truth({"y": Y2}, paths=2, weight=FLAGS),
    shape=(2, 3),
    refusal="mask",
)
def _():
    b = level()
    with numpyro.plate("series", 2):
        with handlers.mask(mask=FLAGS):
            x = ou(b)
        seen(x, Y2)


@case(
    "mask around both",
    ou_truth({"y": [Y2[0], [NAN] * 3]}, paths=2, weight=FLAGS),
    shape=(2, 3),
    refusal="mask",
)
def _():
    b = level()
    with numpyro.plate("series", 2), handlers.mask(mask=FLAGS):
        seen(ou(b), Y2)


@case("mask of one statement", ou_truth({"y": Y}), refusal="mask")
def _():
    x = ou(level())
    seen(x, Y)
    with handlers.mask(mask=False):
        seen(x, Y, "z", slope=2.0)


@case("mask False around both", ou_truth(weight=0.0), refusal="mask|data|observ")
def _():
    b = level()
    with handlers.mask(mask=False):
        seen(ou(b), Y)


@case("mask as long as the times", ou_truth({"y": Y, "weight": 2.0}), refusal="mask")
def _():
    x = ou(level())
    with handlers.mask(mask=np.array([True, False, True])):
        seen(x, Y)


@case("scale around observe", ou_truth({"y": Y, "weight": 0.5}), refusal="scale")
def _():
    x = ou(level())
    with handlers.scale(scale=0.5):
        seen(x, Y)


@case("scale around path", ou_truth({"y": Y}, weight=0.5), refusal="scale")
def _():
    b = level()
    with handlers.scale(scale=0.5):
        x = ou(b)
    seen(x, Y)


@case("scale around both", ou_truth({"y": Y, "weight": 2.0}, weight=2.0), refusal="scale")
def _():
    b = level()
    with handlers.scale(scale=2.0):
        seen(ou(b), Y)


@case(
    "scale of each series",
    ou_truth({"y": Y2, "weight": np.array([[0.5], [2.0]])}, paths=2),
    shape=(2, 3),
    refusal="scale",
)
def _():
    b = level()
    with numpyro.plate("series", 2):
        x = ou(b)
        with handlers.scale(scale=np.array([0.5, 2.0])):
            seen(x, Y2)


@case(
    "scale, mask and plate of instruments",
    ou_truth({"y": Y3, "weight": 0.5 * np.array([[1.0], [0.0], [1.0]])}),
    refusal="scale|mask|plate|instrument|replicate",
)
def _():
    x = ou(level())
    with (
        numpyro.plate("gauges", 3),
        handlers.scale(scale=0.5),
        handlers.mask(mask=np.array([True, False, True])),
    ):
        seen(x, Y3)


# ---------------------------------------------------------------- conditioned and intervened on

X0 = np.array([0.3, -0.1, 0.6])


def _at_zero(b):
    q = ou_truth()(b)
    add_observations(q, index=R, y=Y, slope=0.0, sd=SD)
    return q


class _ScaleSites(handlers.scale):
    """`handlers.scale`, of all but the level, whose prior the engines' answers count once."""

    def process_message(self, msg):
        if msg.get("name") != "b":
            super().process_message(msg)


class _MaskSite(handlers.block):
    """Mask one site out, whatever made it: as a handler of a user's own would."""

    def __init__(self, fn, name):
        super().__init__(fn, hide_fn=lambda _: False)
        self.name = name

    def process_message(self, msg):
        if msg["type"] == "sample" and msg["name"] == self.name:
            msg["fn"] = msg["fn"].mask(False)


CASES += [
    Way(
        "condition on the path",
        handlers.condition(CASES[0].model, {"x": X0}),
        lambda b: CASES[0].truth(b).known(R, X0),
        shape=None,
        refusal="condition|observ|latent|no data|SDEPath",
    ),
    Way(
        "condition on data",
        handlers.condition(lambda: seen(ou(level()), None), {"y": Y}),
        ou_truth({"y": Y}),
    ),
    Way(
        "do",
        handlers.do(CASES[0].model, {"x": np.zeros(3)}),
        _at_zero,
        refusal=r"\bdo\b|interv|no data|observes",
        leaves_latent=True,
    ),
    Way("block of another site", handlers.block(CASES[0].model, hide=["w"]), CASES[0].truth),
    Way(
        "condition on data, outside",
        lambda: seen(ou(level()), None),
        ou_truth({"y": Y}),
        outside=partial(handlers.condition, data={"y": Y}),
    ),
    Way(
        "condition on the path, outside",
        CASES[0].model,
        lambda b: CASES[0].truth(b).known(R, X0),
        shape=None,
        refusal="condition|no latent",
        outside=partial(handlers.condition, data={"x": X0}),
    ),
    Way(
        "do, outside",
        CASES[0].model,
        _at_zero,
        refusal=r"\bdo\b|interv|no data|observes",
        leaves_latent=True,
        outside=partial(handlers.do, data={"x": np.zeros(3)}),
    ),
    # `substitute` gives values; unlike `condition` it leaves the sites among the latent ones.
    Way(
        "substitute data",
        handlers.substitute(lambda: seen(ou(level()), None), {"y": Y}),
        ou_truth({"y": Y}),
        refusal="substitute|no data|observ|latent",
    ),
    Way(
        "scale, outside",
        CASES[0].model,
        ou_truth({"y": Y, "weight": 2.0}, weight=2.0),
        refusal="scale",
        outside=lambda model: _ScaleSites(model, scale=2.0),
    ),
    Way(
        "mask around observe, outside",
        CASES[0].model,
        ou_truth(),
        refusal="mask|data|observ",
        outside=lambda model: _MaskSite(model, "y"),
    ),
]

# ---------------------------------------------------------------- vectors


@case("vector, LocalLinear", vector_truth({"y": YV}), shape=(3, 2))
def _():
    sde = nsde.SDE(
        lambda t, x, p: jnp.asarray(A) @ (x - p), lambda t, x, p: jnp.asarray(L), params=level()
    )
    path = nsde.SDEPath(
        sde, TIMES, dist.Normal(V0, W0).to_event(1), scheme=nsde.schemes.LocalLinear()
    )
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, SD).to_event(1), obs=YV)


@case(
    "component of a vector",
    vector_truth({"index": [0, 2, 4], "y": Y}),
    shape=(3, 2),
    refusal="transform|value",
)
def _():
    x = vector(level())
    seen(x[..., 0], Y)


@case(
    "vector, errors without event_dims",
    vector_truth({"y": YV, "sd": np.array([0.2, 0.5])}),
    shape=(3, 2),
    refusal="event_dims",
)
def _():
    errors = jnp.array([0.2, 0.5])
    nsde.observe(
        "y",
        vector(level()),
        lambda t, x, p: dist.Normal(x, p).to_event(1),
        params=errors,
        obs=YV,
    )


@case("weights without event_dims", ou_truth({"y": Y}), refusal="event_dims")
def _():
    b = level()
    sde = nsde.SDE(
        lambda t, x, p: RATE * (p["b"] - x) + 0.0 * jnp.sum(p["w"]),
        lambda t, x, p: SCALE,
        params={"b": b, "w": jnp.linspace(-1.0, 1.0, 8)},
    )
    path = nsde.SDEPath(sde, TIMES, dist.Normal(M0, S0), scheme=nsde.schemes.LocalLinear())
    seen(numpyro.sample("x", path), Y)


# Asked of every engine in the default run; the rest of the expensive ones is marked slow.
CORE = (
    "plain",
    "data missing in part",
    "masked array",
    "two instruments",
    "transformed",
    "path in a factor",
    "plate of series",
    "plate of instruments",
    "mask around path",
    "scale around observe",
    "do",
    "vector, missing in part",
)

# The same for expensive engines, and for those of which one cell compiles for five seconds.
FEW = ("plain", "transformed", "plate of instruments", "scale around observe")
TWO = ("transformed", "plate of instruments")
ONE = ("plate of instruments",)
