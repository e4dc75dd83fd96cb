r"""`MatchedPath`: a law of paths by its marginals, trained without simulating one.

The law is that of `y_t = m(t) + C(t) e_t`, e a Gaussian process with standard normal marginals. Of
all diffusions with noise `D = L L'` that have these marginals it is the one with the drift

    u(t, y) = m' + C' e - 1/2 D C^-T e + 1/2 div D,   e = C^-1 (y - m),

as its Fokker-Planck equation says: the velocity of the flow `e -> m + C e` and half of
`div(D q) / q`. C is any invertible matrix, so that the law may turn. Against the model's drift f

    log p(y) >= E log p(x_0) - E log q(x_0) + sum_k E log g(y_k | x_k)
                - 1/2 int E |L^-1 (u - f)|^2 dt,

where every expectation is one over a normal law at one time: no path is drawn, times are drawn at
random, and all of them are treated at once (Course and Nair 2023, "Amortized reparametrization:
efficient and scalable variational inference for latent SDEs"; Bartosh, Vetrov and Naesseth 2025,
"SDE matching"). On a grid, e is an Ornstein-Uhlenbeck process with drift `-C^-1 D C^-T e / 2`,
whose steps are known, so that draws have the marginals exactly and densities for weights.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.guides.flows import Conditioner, bounded_input
from numpyro_sde.guides.marginal_curve import Curve, Marginal, cubic_rule
from numpyro_sde.guides.path_laws import (
    PathLaw,
    Place,
    Sizes,
    check_widths,
    encode,
    gap_rows,
    observation_spacing,
    observed_rows,
    register_encoder,
)
from numpyro_sde.guides.steps import hold_value, log_normal
from numpyro_sde.linear.discretize import transition_sqrt
from numpyro_sde.linear.small import cholesky, diagonal, matvec, solve_lower, transpose
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.statespace.guide import log_emissions
from numpyro_sde.statespace.model import StateSpaceModel


class MatchedPath(PathLaw):
    """A law of paths by its normal marginals, trained without simulating one.

    Means and factors of the marginals are cubic between knots, with slopes that may jump there: at
    each observation, and `num_inner` more between two. Train it with `MatchedELBO`, whose cost in a
    step does not depend on the length of the path but for the observations: for long series and
    large panels. The bound is that of the equation itself, not of steps on the grid: the grid may
    then be as coarse as the observations.

    Paths of a positive process are Gaussian in logarithms. The law is the same for all values of
    the parameters, except that its size goes with the noise: posteriors of parameters come out too
    narrow where they lean on the path, as in every mean-field bound; `GaussianMarkovPath` has no
    such limit.

    Args:
        num_inner: knots between two observations.
        num_context: length of the context that an encoder, a recurrent network run backward over
            the data, hands to each knot; 0 for none. With an encoder nothing is learned for one
            series alone: the law serves series that it was not trained on, and mini-batches of
            large panels.
        hidden_dims: widths of the network that makes marginals of contexts.

    Raises:
        ValueError: a size out of range. In use: noise with a memory, inputs or events, fewer noises
            than states, several paths in one model.

    When not to use it: smoothing laws with two modes; short series, where `GaussianMarkovPath` is
    better at once.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.guides import AutoPathGuide, MatchedELBO, MatchedPath
        >>> def model(y):
        ...     sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(-1.0, 0.1)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        >>> guide = AutoPathGuide(model, path=MatchedPath())
        >>> svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-2), MatchedELBO(8))
        >>> y = jax.numpy.array([-0.9, -1.2, -1.0])
        >>> svi.run(jax.random.key(0), 5, y, progress_bar=False).losses.shape
        (5,)
    """

    num_inner: int = eqx.field(static=True)
    num_context: int = eqx.field(static=True)
    hidden_dims: tuple[int, ...] = eqx.field(static=True)
    owns_start = True

    def __init__(
        self,
        num_inner: int = 1,
        *,
        num_context: int = 0,
        hidden_dims: tuple[int, ...] = (32, 32),
    ) -> None:
        at_least("num_inner", num_inner, 0)
        at_least("num_context", num_context, 0)
        self.num_inner, self.num_context = int(num_inner), int(num_context)
        self.hidden_dims = check_widths(hidden_dims)

    @property
    def amortized(self) -> bool:  # type: ignore[override]
        return self.num_context > 0

    def shared_params(self, prefix: str, sizes: Sizes) -> Any:
        if not self.amortized:
            return None
        d = sizes.dim
        inputs, outputs = 2 * self.num_context + 1 + 2 * d + sizes.num_theta, 3 * d * (d + 1)
        network = numpyro.param(
            f"{prefix}_network",
            lambda key: Conditioner.create(key, inputs, self.hidden_dims, outputs),
        )
        return network, register_encoder(prefix, self.num_context, sizes)

    def local_dims(self) -> dict[str, int]:
        if self.amortized:
            return {}
        return {"mean": 2, "mean_slope": 3, "root": 3, "root_slope": 4}

    def local_params(self, prefix: str, sizes: Sizes, lead: tuple[int, ...]) -> dict[str, Array]:
        gaps, d = sizes.num_gaps * (self.num_inner + 1), sizes.dim
        shapes = {
            "mean": (gaps + 1, d),
            "mean_slope": (gaps, 2, d),
            "root": (gaps + 1, d, d),
            "root_slope": (gaps, 2, d, d),
        }
        return {
            name: numpyro.param(
                f"{prefix}_{name}", jnp.zeros(lead + shapes[name]), event_dim=len(shapes[name])
            )
            for name in self.local_dims()
        }

    def start(
        self,
        init: Any,
        model: StateSpaceModel,
        place: Place,
        params: Any,
        shared: Any,
        local: Any,
    ) -> Any:
        del init, params
        return _Start(self, model, place, shared, local)

    def _encoded(self, model: StateSpaceModel, place: Place, shared: Any) -> dict[str, Array]:
        """Parameters at all knots from contexts at the ends of their interval."""
        network, encoder = shared
        rows, d = gap_rows(model), model.dim
        context = encode(encoder, model, place)[rows]
        states = (place.along.guide.reference[rows] - place.center[None]) / place.spread[None]
        inner = self.num_inner + 1
        count = (len(rows) - 1) * inner + 1
        before = np.minimum(np.arange(count) // inner, len(rows) - 2)
        share = (np.arange(count) - before * inner) / inner
        inputs = jnp.concatenate(
            [
                *(context[before], context[before + 1]),
                bounded_input(jnp.concatenate([states[before], states[before + 1]], 1)),
                *(jnp.asarray(share, context.dtype)[:, None], _repeated(place.theta, count)),
            ],
            axis=1,
        )
        out = jax.vmap(network)(inputs)
        mean, root, rest = jnp.split(out, [d, d + d * d], axis=1)
        slopes = rest[:-1].reshape(count - 1, 2, d + d * d)
        return {
            "mean": mean,
            "root": root.reshape(count, d, d),
            "mean_slope": slopes[..., :d],
            "root_slope": slopes[..., d:].reshape(count - 1, 2, d, d),
        }

    def curve(self, model: StateSpaceModel, place: Place, shared: Any, local: Any) -> Curve:
        """The law's marginals as functions of time."""
        _check(model)
        if self.amortized:
            local = self._encoded(model, place, shared)
        times, reference = jnp.asarray(model.times), _to_free(model, place.along.guide.reference)
        rows = jnp.asarray(gap_rows(model))
        inner = jnp.arange(self.num_inner + 1) / (self.num_inner + 1)
        ends = times[rows]
        knots = ends[:-1, None] + inner[None] * jnp.diff(ends)[:, None]
        knots = jnp.append(jnp.ravel(knots), ends[-1])
        base = jnp.stack([jnp.interp(knots, times, column) for column in reference.T], 1)
        fixed = place.start == "fixed"
        gap = observation_spacing(model)
        factor = _factor(model, times[0], reference[0])
        unit = cholesky(factor @ factor.T)
        mean = base + jnp.sqrt(gap) * (local["mean"] @ unit.T)
        root = local["root"]
        if fixed:  # begins at a point, as the noise alone spreads it
            start = _to_free(model, model.init_mean)
            mean, root = mean.at[0].set(start), root.at[0].set(0.0)
        steps = jnp.diff(mean, axis=0)[:, None] + jnp.sqrt(gap) * (local["mean_slope"] @ unit.T)
        turns = jnp.diff(root, axis=0)[:, None] + local["root_slope"]
        return Curve(knots, mean, steps, root, turns, unit, gap, fixed)

    def draw(
        self, model: StateSpaceModel, place: Place, shared: Any, local: Any, x0: Array, z: Array
    ) -> tuple[Array, Array]:
        if model.num_times == 1:
            return model.visible(x0[None]), jnp.zeros((), x0.dtype)
        curve = self.curve(model, place, shared, local)
        at = jax.vmap(curve.at)(jnp.asarray(model.times))
        F, S = _steps(model, curve)
        normals = jnp.reshape(z, (z.shape[0], -1))
        first = _first(curve, at, model, x0)

        def step(e: Array, now: Any) -> tuple[Array, Array]:
            F, S, z = now
            e = matvec(F, e) + matvec(S, z)
            return e, e

        _, rest = lax.scan(step, first, (F, S, normals))
        y = at.mean[1:] + matvec(at.factor[1:], rest)
        x = jnp.concatenate([x0[None], _from_free(model, y)])
        log_det = _log_det(S) + _log_factor(at)[1:] + _log_slope(model, y)
        return model.visible(x), jnp.sum(log_normal(normals)) - jnp.sum(log_det)

    def log_prob(
        self,
        model: StateSpaceModel,
        place: Place,
        shared: Any,
        local: Any,
        path: Array,
        normals: Array | None = None,
    ) -> Array:
        if model.num_times == 1:
            return jnp.zeros((), path.dtype)
        curve = self.curve(model, place, shared, local)
        at = jax.vmap(curve.at)(jnp.asarray(model.times))
        F, S = _steps(model, curve)
        x = jnp.reshape(path, (model.num_times, -1))
        y = _to_free(model, x)
        e = matvec(at.inverse[1:], y[1:] - at.mean[1:])
        e = jnp.concatenate([_first(curve, at, model, x[0])[None], e])
        gap = e[1:] - matvec(F, e[:-1])
        z = solve_lower(S, gap[..., None])[..., 0]
        z = hold_value(z, None if normals is None else jnp.reshape(normals, z.shape))
        log_det = _log_det(S) + _log_factor(at)[1:] + _log_slope(model, y[1:])
        return jnp.sum(log_normal(z)) - jnp.sum(log_det)

    def bound(
        self,
        model: StateSpaceModel,
        place: Place,
        shared: Any,
        local: Any,
        key: Array,
        num_times: int,
    ) -> tuple[Array, Array, Array]:
        """The bound of one path without the density of its start, and where that is to be taken.

        Args:
            model: the path and its instruments.
            place: where it stands.
            shared: parameters of all series.
            local: parameters of this one.
            key: of the times, and of one rule of quadrature at each.
            num_times: times at which the drifts are compared.

        Returns:
            Points of the first state, their weights, and the bound.
        """
        curve = self.curve(model, place, shared, local)
        times = jnp.asarray(model.times)
        key_times, key_cost, key_data = jax.random.split(key, 3)
        shares = (jnp.arange(num_times) + jax.random.uniform(key_times, (num_times,))) / num_times
        at = times[0] + shares * (times[-1] - times[0])

        def cost(t: Array, key: Array) -> Array:
            points, weights = cubic_rule(key, model.dim)
            return weights @ jax.vmap(lambda e: _cost(model, curve, t, e))(points)

        costs = jax.vmap(cost)(at, jax.random.split(key_cost, num_times))
        bound = -jnp.mean(costs) * (times[-1] - times[0])

        # The last rule is the start's, which is not observed where it is known.
        rows = np.append(observed_rows(model), 0)
        keys = jax.random.split(key_data, rows.size)
        points, weights = jax.vmap(lambda key: cubic_rule(key, model.dim))(keys)
        seen = jax.vmap(curve.at)(times[rows])
        y = seen.mean[:, None] + matvec(seen.factor[:, None], points)
        states = jnp.swapaxes(_from_free(model, y), 0, 1)
        if rows.size > 1:
            reference = place.along.guide.reference
            terms = jax.vmap(
                lambda x: log_emissions(model, reference.at[rows[:-1]].set(x))[rows[:-1]]
            )(states[:, :-1])
            bound = bound + jnp.sum(terms * weights[:-1].T)
        start = _Start(self, model, place, shared, local)
        return states[:, -1], weights[-1], bound + start.entropy()


def _check(model: StateSpaceModel) -> None:
    if model.state_shape is not None or getattr(model.sde, "inputs", None) is not None:
        raise ValueError(
            "MatchedPath takes SDEs driven by Brownian motion, without inputs and without noise "
            "with a memory: use ControlledPath()"
        )
    if model.has_events:
        raise ValueError("MatchedPath takes paths without events: use ControlledPath()")
    noises = model.factor(0.0, model.init_mean).shape[1]
    if noises < model.dim:
        raise ValueError(
            f"MatchedPath needs as many noises as states, got {noises} for {model.dim}: use "
            "GaussianMarkovPath() with scheme=LocalLinear()"
        )


def _to_free(model: StateSpaceModel, x: Array) -> Array:
    return jnp.log(x) if model.sde.positive else x


def _from_free(model: StateSpaceModel, y: Array) -> Array:
    return jnp.exp(y) if model.sde.positive else y


def _log_slope(model: StateSpaceModel, y: Array) -> Array:
    """Log derivative of states in their free coordinates, `(n,)`."""
    return jnp.sum(y, -1) if model.sde.positive else jnp.zeros(y.shape[:-1], y.dtype)


def _factor(model: StateSpaceModel, t: Array, y: Array) -> Float[Array, "d m"]:
    """Diffusion in the free coordinate."""
    x = _from_free(model, y)
    L = model.factor(t, x)
    return L / x[:, None] if model.sde.positive else L


def _drift(model: StateSpaceModel, t: Array, y: Array) -> Float[Array, " d"]:
    """Drift in the free coordinate, by Ito's formula."""
    x = _from_free(model, y)
    drift = model.drift(t, x)
    if not model.sde.positive:
        return drift
    return drift / x - 0.5 * jnp.sum(_factor(model, t, y) ** 2, 1)


def _divergence(model: StateSpaceModel, t: Array, y: Array) -> Array:
    """`sum_j d_j D_ij`; nothing where the noise does not depend on the state."""
    shape = () if model.scalar else (model.dim,)
    if not model.sde.positive and not dependence(model.sde, "diffusion", shape).state:
        return jnp.zeros_like(y)

    def covariance(y: Array) -> Array:
        L = _factor(model, t, y)
        return L @ L.T

    return jnp.trace(jax.jacfwd(covariance)(y), axis1=1, axis2=2)


def _cost(model: StateSpaceModel, curve: Curve, t: Array, e: Array) -> Array:
    """Half the squared distance of the two drifts at one state, in units of the noise."""
    now, slope = jax.jvp(curve.at, (t,), (jnp.ones_like(t),))
    y = now.mean + matvec(now.factor, e)
    L = _factor(model, t, y)
    D = L @ L.T
    velocity = slope.mean + matvec(slope.factor, e)
    score = -matvec(transpose(now.inverse), e)
    u = velocity + 0.5 * matvec(D, score) + 0.5 * _divergence(model, t, y)
    gap = u - _drift(model, t, y)
    return 0.5 * jnp.sum(solve_lower(cholesky(D), gap[:, None]) ** 2)


def _steps(model: StateSpaceModel, curve: Curve) -> tuple[Array, Array]:
    """Transition matrices and noise factors of the whitened law on the grid."""
    times = jnp.asarray(model.times)

    def one(t: Array, dt: Array) -> tuple[Array, Array]:
        middle = t + 0.5 * dt
        now = curve.at(middle)
        L = now.inverse @ _factor(model, middle, now.mean)
        A = -0.5 * (L @ L.T)
        if len(A) == 1:
            F = jnp.exp(A * dt)
            return F, jnp.sqrt(-jnp.expm1(2.0 * A * dt))
        step = transition_sqrt(A, jnp.zeros(len(A), A.dtype), L, dt)
        return step.F, step.Q

    F, S = jax.vmap(one)(times[:-1], jnp.diff(times))
    if curve.fixed:  # all noise is new where a path leaves a known state
        F, S = F.at[0].set(0.0), S.at[0].set(jnp.eye(model.dim, dtype=S.dtype))
    return F, S


def _first(curve: Curve, at: Marginal, model: StateSpaceModel, x0: Array) -> Array:
    if curve.fixed:
        return jnp.zeros_like(x0)
    return matvec(at.inverse[0], _to_free(model, x0) - at.mean[0])


def _log_det(S: Array) -> Array:
    return jnp.sum(jnp.log(diagonal(S)), -1)


def _log_factor(at: Marginal) -> Array:
    return jnp.linalg.slogdet(at.factor)[1]


def _repeated(a: Array, count: int) -> Array:
    return jnp.broadcast_to(a[None], (count, a.size))


class _Start:
    """The first state's law: the marginal there."""

    def __init__(
        self, law: MatchedPath, model: StateSpaceModel, place: Place, shared: Any, local: Any
    ) -> None:
        self.law, self.model, self.place = law, model, place
        self.shared, self.local = shared, local
        self.kind = place.start
        if self.kind != "fixed":
            curve = law.curve(model, place, shared, local)
            self.at = curve.at(curve.knots[0])

    def held(self) -> _Start:
        """The same law, its parameters held."""
        shared, local = lax.stop_gradient((self.shared, self.local))
        return _Start(self.law, self.model, self.place, shared, local)

    def entropy(self) -> Array:
        """Entropy of the free coordinate less the mean log slope: `-E log q(x_0)`."""
        if self.kind == "fixed":
            return jnp.zeros((), self.model.init_mean.dtype)
        size = self.model.dim
        entropy = 0.5 * size * (1.0 + jnp.log(2.0 * jnp.pi))
        return entropy + self._log_slope(self.at.mean)

    def draw(self, z: Float[Array, " u"]) -> tuple[Array, Array]:
        """First state of standard normals, and its log density."""
        if self.kind == "fixed":
            return self.model.init_mean, jnp.zeros((), self.model.init_mean.dtype)
        y = self.at.mean + matvec(self.at.factor, z)
        return _from_free(self.model, y), jnp.sum(log_normal(z)) - self._log_slope(y)

    def log_prob(self, x: Float[Array, " u"], normals: Array | None = None) -> Array:
        """Log density of a first state; `normals` are those behind it, if known."""
        if self.kind == "fixed":
            return jnp.zeros((), x.dtype)
        y = _to_free(self.model, x)
        z = hold_value(matvec(self.at.inverse, y - self.at.mean), normals)
        return jnp.sum(log_normal(z)) - self._log_slope(y)

    def _log_slope(self, y: Array) -> Array:
        return jnp.linalg.slogdet(self.at.factor)[1] + _log_slope(self.model, y)
