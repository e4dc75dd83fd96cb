"""Ways to say a linear model of normal laws, each with its density: what checks of engines run.

All speak of an Ornstein-Uhlenbeck path of three times (or a path of two components) with one
parameter, the level of return, at the site `b`; the path is the site `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike
from numpyro.util import identity

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.observe import observe
from numpyro_sde.processes import LinearSDE, OrnsteinUhlenbeck
from numpyro_sde.testing.quadratic import Quadratic, add_linear_path, add_observations

TIMES = np.array([0.0, 0.4, 1.0])
RATE, SCALE, M0, S0, SD = 1.3, 0.8, 0.2, 1.1, 0.3
A = np.array([[-1.0, 0.4], [-0.3, -0.5]])
L = np.array([[0.5, 0.0], [0.3, 0.6]])
V0, W0 = np.array([0.2, -0.1]), 0.7
NAN = np.nan
Y = np.array([0.9, -0.2, 0.5])
Y2 = np.array([[0.9, -0.2, 0.5], [-0.6, 0.4, 1.1]])
Y3 = np.array([[0.9, -0.2, 0.5], [0.6, 0.1, 0.8], [1.2, -0.4, 0.3]])
YV = np.array([[0.4, -0.3], [0.7, 0.2], [-0.1, 0.6]])


@dataclass(frozen=True)
class Way:
    """One way to say a model.

    Attributes:
        name: of the way.
        model: the model, called with `args`; its sites are `b`, `x` and data.
        truth: `b` to the joint density of path and data, without the prior of `b`.
        shape: shape of the path's value; None where the path is no latent site.
        args: arguments of the model.
        refusal: a pattern that a refusal must match; None where no engine may refuse.
        must_refuse: whether there is no right number.
        copies: how often `log p(y)` counts with the path integrated out (subsampled plates).
        leaves_latent: whether `marginalize` may leave the path latent: no `observe` sees it.
        outside: a handler to put around the model after its path is treated.
    """

    name: str
    model: Callable[..., Any]
    truth: Callable[[float], Quadratic]
    shape: tuple[int, ...] | None = (3,)
    args: tuple[Any, ...] = ()
    refusal: str | None = None
    must_refuse: bool = False
    copies: float = 1.0
    leaves_latent: bool = False
    outside: Callable[[Callable[..., Any]], Callable[..., Any]] = identity

    def __str__(self) -> str:
        return self.name

    def evidence(self, b: float) -> float:
        """Log of the integral of the joint density over the path."""
        return self.copies * self.truth(b).evidence()

    def score(self, b: float, step: float = 1e-4) -> float:
        """Its derivative by `b`, a central difference (the evidence is quadratic in `b`)."""
        return (self.evidence(b + step) - self.evidence(b - step)) / (2 * step)


def add_to(ways: list[Way], name: str, truth: Callable[[float], Quadratic], **options: Any) -> Any:
    """A decorator that adds a model to a table of ways."""

    def add(model: Callable[..., Any]) -> Callable[..., Any]:
        ways.append(Way(name, model, truth, **options))
        return model

    return add


def level() -> Array:
    """The parameter's site."""
    return jnp.asarray(numpyro.sample("b", dist.Normal(0.0, 1.0)))


def ou(b: ArrayLike, times: Any = TIMES) -> Any:
    """The site of a scalar path."""
    sde = OrnsteinUhlenbeck(RATE, b, SCALE)
    return numpyro.sample("x", SDEPath(sde, times, init=dist.Normal(M0, S0)))


def vector(b: ArrayLike) -> Any:
    """The site of a path of two components."""
    sde = LinearSDE(A, -jnp.asarray(A) @ jnp.stack([jnp.asarray(b)] * 2), L)
    return numpyro.sample("x", SDEPath(sde, TIMES, dist.Normal(V0, W0).to_event(1)))


def seen(
    x: Any, y: Any, name: str = "y", slope: float = 1.0, sd: float = SD, **options: Any
) -> Array:
    """Normal observations of a scalar path."""
    return observe(name, x, lambda _, x: dist.Normal(slope * x, sd), obs=y, **options)


def seen_vector(x: Any, y: Any) -> Array:
    """Normal observations of both components."""
    return observe("y", x, lambda _, x: dist.Normal(x, SD).to_event(1), obs=y)


def ou_truth(
    *statements: dict[str, Any], paths: int = 1, weight: Any = 1.0, times: Any = TIMES
) -> Callable[[float], Quadratic]:
    """Scalar paths of weights `weight`, and statements as keywords of `add_observations`."""
    index = np.arange(paths * TIMES.size).reshape(paths, TIMES.size)
    weights, clocks = np.broadcast_to(weight, paths), np.broadcast_to(times, index.shape)

    def truth(b: float) -> Quadratic:
        joint = Quadratic(index.size)
        for i, w, clock in zip(index, weights, clocks, strict=True):
            law = (-RATE, RATE * b, SCALE, M0, S0**2)
            add_linear_path(joint, i[:, None], clock, *law, float(w))
        for statement in statements:
            add_observations(joint, **{"index": np.squeeze(index), "sd": SD, **statement})
        return joint

    return truth


def vector_truth(*statements: dict[str, Any]) -> Callable[[float], Quadratic]:
    """A path of two components, and statements as keywords of `add_observations`."""
    index = np.arange(6).reshape(3, 2)

    def truth(b: float) -> Quadratic:
        joint = Quadratic(6)
        add_linear_path(joint, index, TIMES, A, -A @ np.full(2, b), L, V0, W0**2 * np.eye(2))
        for statement in statements:
            add_observations(joint, **{"index": index, "sd": SD, **statement})
        return joint

    return truth


WAYS: list[Way] = []
GAPS = np.array([0.9, NAN, 0.5])


@add_to(WAYS, "plain", ou_truth({"y": Y}))
def _plain() -> None:
    seen(ou(level()), Y)


@add_to(WAYS, "data as argument", ou_truth({"y": Y}), args=(Y,))
def _argument(y: Any) -> None:
    seen(ou(level()), y)


@add_to(WAYS, "data missing in part", ou_truth({"y": GAPS}))
def _missing() -> None:
    seen(ou(level()), GAPS)


@add_to(WAYS, "data all missing", ou_truth(), refusal="data|observ|missing")
def _all_missing() -> None:
    seen(ou(level()), np.full(3, NAN))


@add_to(WAYS, "integer data", ou_truth({"y": [1, 0, 2]}))
def _integer() -> None:
    seen(ou(level()), np.array([1, 0, 2]))


@add_to(WAYS, "some times", ou_truth({"index": [0, 2], "y": [0.9, 0.5]}))
def _some_times() -> None:
    seen(ou(level()), np.array([0.9, 0.5]), at=[0, 2])


@add_to(WAYS, "times repeated", ou_truth({"index": [0, 0, 2], "y": [0.9, 0.7, 0.5]}))
def _repeated() -> None:
    seen(ou(level()), np.array([0.9, 0.7, 0.5]), at=[0, 0, 2])


@add_to(WAYS, "times from the end", ou_truth({"index": [2, 0], "y": [0.5, 0.9]}))
def _from_the_end() -> None:
    seen(ou(level()), np.array([0.5, 0.9]), at=[-1, 0])


@add_to(
    WAYS,
    "two instruments",
    ou_truth({"y": GAPS}, {"index": [0, 2], "y": [1.6, NAN], "slope": 2.0, "sd": 0.5}),
)
def _two_instruments() -> None:
    x = ou(level())
    seen(x, GAPS)
    seen(x, np.array([1.6, NAN]), "z", slope=2.0, sd=0.5, at=[0, 2])


@add_to(WAYS, "plate of series", ou_truth({"y": Y2}, paths=2), shape=(2, 3))
def _series() -> None:
    b = level()
    with numpyro.plate("series", 2):
        seen(ou(b), Y2)


CLOCKS = np.array([[0.0, 0.4, 1.0], [0.0, 0.7, 0.9]])


@add_to(
    WAYS,
    "plate of series, own clocks",
    ou_truth({"y": Y2}, paths=2, times=CLOCKS),
    shape=(2, 3),
)
def _clocks() -> None:
    b = level()
    with numpyro.plate("series", 2):
        seen(ou(b, CLOCKS), Y2)


@add_to(WAYS, "vector", vector_truth({"y": YV}), shape=(3, 2))
def _vector() -> None:
    seen_vector(vector(level()), YV)


YV_GAPS = np.where(np.abs(YV) > 0.5, NAN, YV)


@add_to(WAYS, "vector, missing in part", vector_truth({"y": YV_GAPS}), shape=(3, 2))
def _vector_missing() -> None:
    seen_vector(vector(level()), YV_GAPS)


def chosen(names: Sequence[str] | None) -> list[Way]:
    """The ways of these names, all for None.

    Raises:
        ValueError: a name that is none.
    """
    if names is None:
        return WAYS
    known = {way.name: way for way in WAYS}
    unknown = [name for name in names if name not in known]
    if unknown or isinstance(names, str):
        raise ValueError(f"ways must be among {sorted(known)}, got {names!r}")
    return [known[name] for name in names]
