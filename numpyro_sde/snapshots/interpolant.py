"""Stochastic interpolants between clouds: an SDE with a velocity and a score learned from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.grid import check_times
from numpyro_sde.parameters import as_function
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.bridge import BridgeResult
from numpyro_sde.snapshots.cells import Cells, as_cells, stack_snapshots
from numpyro_sde.snapshots.velocity import EDGE, LearnedVelocity, NoiseScale
from numpyro_sde.statespace.checks import check_count, typed_key


def _drift(t: Any, x: Any, p: Any) -> Array:
    velocity, score = p["field"].parts(t, x)
    return velocity + 0.5 * p["noise"] ** 2 * score


def _diffusion(t: Any, x: Any, p: Any) -> Array:  # noqa: ARG001
    return p["noise"]


class Interpolant(SDE):
    """An SDE whose populations are those of an interpolant between clouds, at every noise level.

    `dX = (b + noise^2 / 2 s) dt + noise dW` with the learned velocity b and score s: the
    populations are the same for every `noise`, 0 among them, an ordinary differential equation.
    Draws start from cells of the first cloud, `SDEPath(sde, times, dist.Delta(x0, event_dim=1))`.

    Attributes:
        losses: training loss, averaged over each hundredth of the steps.

    Args:
        field: the learned velocity.
        noise: diffusion, state units per square root of time.
        losses: of the training.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> x0, x1 = np.random.default_rng(0).normal([[0.0], [2.0]], 0.5, (2, 200))
        >>> sde = nsde.interpolant(x0, x1, num_steps=20)
        >>> sde.with_noise(0.0).score(0.5, 1.0).shape
        ()
    """

    losses: Array = eqx.field(default=None)

    def __init__(self, field: LearnedVelocity, noise: ArrayLike, losses: Array) -> None:
        super().__init__(_drift, _diffusion, params={"field": field, "noise": jnp.asarray(noise)})
        self.losses = losses

    @property
    def field(self) -> LearnedVelocity:
        """The learned velocity and score."""
        return self.params["field"]

    @property
    def times(self) -> Array:
        """Times of the clouds, `(K,)`."""
        return self.field.times

    def with_noise(self, noise: ArrayLike) -> Interpolant:
        """The same populations at another noise level.

        Args:
            noise: diffusion, not negative.

        Raises:
            ValueError: a negative one.
        """
        if not isinstance(noise, jax.core.Tracer) and not np.asarray(noise) >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        return Interpolant(self.field, noise, self.losses)

    def velocity(self, t: ArrayLike, x: Float[ArrayLike, "*state"]) -> Float[Array, "*state"]:
        """Velocity of the population at one state: the drift without noise."""
        return self.field.parts(t, jnp.asarray(x))[0]

    def score(self, t: ArrayLike, x: Float[ArrayLike, "*state"]) -> Float[Array, "*state"]:
        """Gradient of the log density of the population at one state."""
        return self.field.parts(t, jnp.asarray(x))[1]

    def log_prob(
        self,
        x: Float[ArrayLike, "n *state"],
        base: dist.Distribution,
        *,
        time: float | None = None,
        num_steps: int = 60,
    ) -> Float[Array, " n"]:
        """Log density of the population at a time, by the flow without noise.

        The instantaneous change of variables along the velocity, back to the first cloud (Chen,
        Rubanova, Bettencourt and Duvenaud 2018), by Runge-Kutta steps that are short where the
        velocity is steep, at the ends of gaps. Right as far as the velocity is.

        Args:
            x: states.
            base: law of the first cloud.
            time: the time; None for the last.
            num_steps: steps in each gap.

        Raises:
            ValueError: a time outside the clouds'.
        """
        check_count("num_steps", num_steps)
        times = np.asarray(self.times)
        end = float(times[-1] if time is None else time)
        if not times[0] <= end <= times[-1]:
            raise ValueError(f"time must lie in {times[0]:g}..{times[-1]:g}, got {end:g}")
        states = jnp.asarray(x, self.times.dtype)
        knots = np.append(times[times < end], end)
        # s = sin^2: a square root at either end becomes smooth.
        shares = np.sin(0.5 * np.pi * np.linspace(0.0, 1.0, num_steps + 1)[:-1]) ** 2
        inner = (knots[:-1, None] + np.diff(knots)[:, None] * shares[None]).ravel()
        grid = jnp.asarray(np.append(inner, end)[::-1].copy(), states.dtype)
        starts, moved = _flow_back(self.field, grid, states)
        return jnp.asarray(base.log_prob(starts)) - moved


@eqx.filter_jit
def _flow_back(field: LearnedVelocity, grid: Array, x: Array) -> tuple[Array, Array]:
    """First states of the flow through x, and the integrated divergence along it."""

    def slope(t: Array, x: Array) -> tuple[Array, Array]:
        def velocity(x: Array) -> tuple[Array, Array]:
            b = field.parts(t, x)[0]
            return b, b

        jacobian, b = jax.jacfwd(velocity, has_aux=True)(x)
        return b, jnp.trace(jnp.reshape(jacobian, (x.size, x.size)))

    def step(carry: tuple[Array, Array], now: tuple[Array, Array]) -> Any:
        (x, total), (t, later) = carry, now
        h = later - t
        b1, d1 = slope(t, x)
        b2, d2 = slope(t + h / 2, x + h / 2 * b1)
        b3, d3 = slope(t + h / 2, x + h / 2 * b2)
        b4, d4 = slope(later, x + h * b3)
        x = x + h / 6 * (b1 + 2 * b2 + 2 * b3 + b4)
        return (x, total - h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    def one(x: Array) -> tuple[Array, Array]:
        return lax.scan(step, (x, jnp.zeros((), x.dtype)), (grid[:-1], grid[1:]))[0]

    return jax.vmap(one)(x)


def interpolant(
    x0: ArrayLike,
    x1: ArrayLike,
    *more: ArrayLike,
    times: ArrayLike | None = None,
    coupling: str | ArrayLike | Sequence[ArrayLike] | BridgeResult = "independent",
    gamma: float | Callable[[Any], Any] = 1.0,
    noise: float | None = None,
    width: int = 64,
    depth: int = 3,
    num_steps: int = 4000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
    rng_key: PRNGKeyArray | None = None,
) -> Interpolant:
    r"""Learn an SDE that carries one cloud into the next, from pairs of their cells.

    Between two clouds `x_t = (1 - s) x_0 + s x_1 + gamma(s) z` with z normal; the mean velocity and
    the score of its population are learned by regression, without simulation. With the
    coupling of a Schrödinger bridge under Brownian motion of scale `gamma` the SDE at `noise=gamma`
    is that bridge; with independent pairs it is another process through the same clouds.

    Args:
        x0: cells of the first cloud, `(n, d)` or `(n,)`.
        x1: cells of the second.
        more: cells of further clouds.
        times: times of the clouds, `(K,)`; None for 0, 1, 2, ...
        coupling: "independent"; "paired", each cell with the one of its row in the next cloud; a
            matrix of pair probabilities `(n_0, n_1)` (of several gaps a list); or the
            `BridgeResult` of the same clouds.
        gamma: scale of the noise between clouds: a number g for `g sqrt(T s (1 - s))`, Brownian
            bridges of a gap of length T, in state units per square root of time; or a function
            of s in [0, 1] that is zero at both ends.
        noise: diffusion of the SDE; None for `gamma` where it is a number, else 1. `with_noise`
            changes it afterwards.
        width: units of each hidden layer.
        depth: number of hidden layers.
        num_steps: training steps of Adam, its rate falling to zero by a cosine.
        batch_size: pairs for each step.
        learning_rate: of the first step.
        rng_key: random key; None for `jax.random.key(0)`.

    Returns:
        The SDE: simulate it by `SDEPath`; `velocity`, `score`, `log_prob`. A point estimate of a
        network: it has no posterior and knows no parameter of a mechanism.

    Raises:
        ValueError: shapes that do not fit, options out of range.
        TypeError: a coupling or gamma of the wrong kind.

    When not to use it: where a mechanism is known, `SnapshotLaw`; where lineages matter and no
    coupling is given: independent pairs say who is there, not who became whom.

    Example:
        >>> import jax, numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> x0, x1 = np.random.default_rng(0).normal([[0.0], [2.0]], 0.5, (2, 200))
        >>> sde = nsde.interpolant(x0, x1, num_steps=20)
        >>> path = nsde.SDEPath(sde, np.linspace(0.0, 1.0, 11), dist.Delta(x0))
        >>> path.sample(jax.random.key(0)).shape
        (200, 11)
    """
    for name, count in (
        ("width", width),
        ("depth", depth),
        ("num_steps", num_steps),
        ("batch_size", batch_size),
    ):
        check_count(name, count)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    clouds = stack_snapshots([x0, x1, *more])
    clock = np.arange(len(clouds), dtype=float) if times is None else check_times(times)
    cells = as_cells(clouds, clock)
    scale = _noise_scale(gamma)
    if noise is None:
        noise = 1.0 if scale.size is None else scale.size
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    pairs = _pair_totals(coupling, cells)
    key_net, key_train = jax.random.split(
        typed_key(jax.random.key(0) if rng_key is None else rng_key)
    )
    d, gaps = cells.values.shape[2], len(clock) - 1
    net = eqx.nn.MLP(d + 3 + gaps, 2 * d, width, depth, jax.nn.silu, key=key_net)
    shares = np.asarray(cells.weights)[..., None] / (gaps + 1)
    center = (shares * np.asarray(cells.values)).sum((0, 1))
    spread = np.sqrt((shares * (np.asarray(cells.values) - center) ** 2).sum((0, 1)))
    real = cells.values.dtype
    field = LearnedVelocity(
        net,
        jnp.asarray(clock, real),
        jnp.asarray(center, real),
        jnp.asarray(np.where(spread > 0, spread, 1.0), real),
        scale,
        cells.scalar,
    )
    paired = isinstance(coupling, str) and coupling == "paired"
    optimizer = _Optimizer(float(learning_rate), num_steps)
    sizes = (num_steps, batch_size, paired)
    field, losses = _train(field, cells, pairs, key_train, optimizer, sizes)
    return Interpolant(field, float(noise), losses)


def _noise_scale(gamma: Any) -> NoiseScale:
    if callable(gamma):
        function = as_function(gamma, "gamma", "s", {})
        ends = [float(jnp.reshape(jnp.asarray(function(jnp.asarray(s))), ())) for s in (0.0, 1.0)]
        if max(abs(e) for e in ends) > 1e-5:
            raise ValueError(f"gamma must be zero at both ends, got {ends[0]:g} and {ends[1]:g}")
        return NoiseScale(None, function)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float | np.floating | np.integer):
        raise TypeError(f"gamma must be a number or a function of s, got {gamma!r}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return NoiseScale(float(gamma), None)


def _pair_totals(coupling: Any, cells: Cells) -> tuple[Array, Array] | None:
    """Probabilities of starts `(K - 1, n)`, and of ends given each `(K - 1, n, n)`, summed up.

    None where no matrix is given.
    """
    gaps, n = cells.values.shape[0] - 1, cells.values.shape[1]
    if isinstance(coupling, str):
        if coupling not in ("independent", "paired"):
            raise ValueError(
                "coupling must be 'independent', 'paired', a matrix or a BridgeResult, got "
                f"{coupling!r}"
            )
        if coupling == "paired" and not bool(jnp.all(cells.weights > 0)):
            raise ValueError("coupling='paired' needs clouds of one size")
        return None
    if isinstance(coupling, BridgeResult):
        if coupling.batch_shape:
            raise ValueError("coupling must be one bridge, got a batch of them")
        given = [np.asarray(pi) for pi in coupling.couplings]
    else:
        array = coupling if isinstance(coupling, list | tuple) else np.asarray(coupling)
        given = [np.asarray(array)] if np.ndim(array[0]) == 1 else [np.asarray(a) for a in array]
    counts = np.asarray(cells.weights > 0).sum(1)
    if len(given) != gaps:
        raise ValueError(f"coupling must hold {gaps} matrices, one for each gap, got {len(given)}")
    out = np.zeros((gaps, n, n))
    for k, pi in enumerate(given):
        wanted = ((n, n), (int(counts[k]), int(counts[k + 1])))
        if pi.shape not in wanted or (pi < 0).any() or not pi.sum() > 0:
            raise ValueError(
                f"coupling {k} must be probabilities of shape {wanted[1]}, got shape {pi.shape}"
                f"{'' if pi.shape not in wanted else ' with negative entries, or none'}"
            )
        out[k, : pi.shape[0], : pi.shape[1]] = pi
    starts = np.cumsum(out.sum(2), axis=1)
    ends = np.cumsum(out, axis=2)
    last = np.where(ends[..., -1:] > 0, ends[..., -1:], 1.0)
    real = cells.values.dtype
    return jnp.asarray(starts / starts[:, -1:], real), jnp.asarray(ends / last, real)


def _load_optax() -> Any:
    """The module `optax`.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            "training an interpolant needs Optax: pip install 'numpyro-sde[optax]'"
        ) from error
    return optax


class _Optimizer(eqx.Module):
    """Adam with a rate that falls to zero; compared by its numbers, so that programs are found."""

    learning_rate: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    @property
    def transform(self) -> Any:
        """The transformation of Optax."""
        optax = _load_optax()
        rate = optax.cosine_decay_schedule(self.learning_rate, self.num_steps)
        return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


@eqx.filter_jit
def _train(
    field: LearnedVelocity,
    cells: Cells,
    pairs: tuple[Array, Array] | None,
    key: PRNGKeyArray,
    optimizer: _Optimizer,
    sizes: tuple[int, int, bool],
) -> tuple[LearnedVelocity, Array]:
    """Fit the network; the trained field and the loss in hundredths of the steps."""
    transform, (num_steps, batch_size, paired) = optimizer.transform, sizes
    weights, rest = eqx.partition(field.net, eqx.is_inexact_array)

    def loss(weights: Any, batch: Any) -> Array:
        net = eqx.combine(weights, rest)
        trained = eqx.tree_at(lambda f: f.net, field, net)
        return jnp.mean(jax.vmap(partial(_misfit, trained))(*batch))

    def step(carry: Any, key: PRNGKeyArray) -> Any:
        weights, state = carry
        batch = _draw_batch(field, cells, pairs, key, batch_size, paired)
        value, slope = jax.value_and_grad(loss)(weights, batch)
        updates, state = transform.update(slope, state, weights)
        return (_load_optax().apply_updates(weights, updates), state), value

    start = (weights, transform.init(weights))
    (weights, _), values = lax.scan(step, start, jax.random.split(key, num_steps))
    size = max(num_steps // 100, 1)
    losses = values[: num_steps // size * size].reshape(-1, size).mean(1)
    return eqx.tree_at(lambda f: f.net, field, eqx.combine(weights, rest)), losses


def _misfit(field: LearnedVelocity, gap: Array, s: Array, x: Array, pace: Array, z: Array) -> Array:
    """Squared errors of both means, in units of the cloud."""
    m, eta = field.means(gap, s, x)
    span = field.times[-1] - field.times[0]
    return jnp.sum(((m - pace) * span / field.width) ** 2) + jnp.sum((eta - z) ** 2)


def _draw_batch(
    field: LearnedVelocity,
    cells: Cells,
    pairs: tuple[Array, Array] | None,
    key: PRNGKeyArray,
    count: int,
    paired: bool,
) -> tuple[Array, ...]:
    """Gaps, shares of them, points of the interpolant, displacements over time and noise."""
    keys = jax.random.split(key, 4)
    gaps, n, d = cells.values.shape[0] - 1, cells.values.shape[1], cells.values.shape[2]
    real = cells.values.dtype
    gap = jax.random.randint(keys[0], (count,), 0, gaps)
    # Stratified in time: less noise in the loss.
    u = (jnp.arange(count, dtype=real) + jax.random.uniform(keys[1], (count,), real)) / count
    s = EDGE + (1.0 - 2.0 * EDGE) * u
    if paired:
        i = j = jax.random.randint(keys[2], (count,), 0, n)
    else:
        u = jax.random.uniform(keys[2], (2, count), real)
        if pairs is None:
            totals = jnp.cumsum(cells.weights, axis=1)
            i = _draw(lambda at: totals[gap, at], n, u[0] * totals[gap, -1])
            j = _draw(lambda at: totals[gap + 1, at], n, u[1] * totals[gap + 1, -1])
        else:
            starts, ends = pairs
            i = _draw(lambda at: starts[gap, at], n, u[0])
            j = _draw(lambda at: ends[gap, i, at], n, u[1])
    x0, x1 = cells.values[gap, i], cells.values[gap + 1, j]
    z = jax.random.normal(keys[3], (count, d), real)
    length = field.times[gap + 1] - field.times[gap]
    scale = jax.vmap(field.noise)(s, length)[:, None]
    x = (1.0 - s[:, None]) * x0 + s[:, None] * x1 + scale * z
    return gap, s, x, (x1 - x0) / length[:, None], z


def _draw(totals: Callable[[Array], Array], n: int, u: Array) -> Array:
    """First places of n at which totals, increasing, exceed u: a search that holds no table.

    Args:
        totals: totals at given places, one for each u.
        n: number of places.
        u: numbers from 0 to the last total.
    """
    low, high = jnp.zeros(u.shape, jnp.int32), jnp.full(u.shape, n - 1, jnp.int32)
    for _ in range(max(n - 1, 1).bit_length()):
        middle = (low + high) // 2
        beyond = totals(middle) > u
        low, high = jnp.where(beyond, low, middle + 1), jnp.where(beyond, middle, high)
        low = jnp.minimum(low, high)
    return low
