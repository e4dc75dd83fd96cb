"""Coupling flows in plain JAX: smooth invertible maps of `R^d` with a cheap log-determinant.

A coupling layer leaves some coordinates as they are (the passive ones) and maps each of the
others by a monotone scalar function whose parameters are a small network of the passive
coordinates and of an optional context vector. Both directions then cost one pass, which is why
these flows serve a guide (sampling) and a conditional density (evaluation) alike.

Two scalar functions are offered: `affine` (Dinh, Sohl-Dickstein, Bengio 2017, arXiv:1605.08803)
and `spline`, the monotone rational-quadratic spline of Durkan, Bekasov, Murray, Papamakarios
2019, "Neural Spline Flows", arXiv:1906.04032, followed by an affine map so that a layer can also
move mass beyond the spline's box. A new flow is exactly the identity. Nothing here knows NumPyro:
`numpyro_sde.guides.transforms` holds the `Transform` over it.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.ranks import equal_rank

CouplingKind = Literal["affine", "spline"]

# A bin narrower than this share of the box, or a slope smaller than this, costs float32 more
# accuracy in the inverse than it adds to what the spline can represent.
_MIN_BIN_SHARE = 1e-3
_MIN_SLOPE = 1e-3
# Soft limits that keep a flow in training from throwing single draws far into the tail, where a
# model overflows: one layer stretches by at most e^3 = 20, neighbouring bins of a spline differ
# by at most e^3 in size, and a network sees its inputs within (-5, 5), so that beyond the bulk a
# layer is linear with constant coefficients.
_MAX_LOG_SCALE = 3.0
_MAX_SPLINE_LOGIT = 1.5
_MAX_INPUT = 5.0


def rational_quadratic_spline(
    x: Float[Array, "*batch"],
    widths: Float[Array, "*batch bins"],
    heights: Float[Array, "*batch bins"],
    slopes: Float[Array, "*batch bins-1"],
    *,
    bound: float,
    inverse: bool = False,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Map scalars by a monotone rational-quadratic spline, the identity outside its box.

    The three parameter arrays are unconstrained; all zeros give the identity. Source: Durkan et
    al. 2019, equations 4 to 8; the inverse is the root of the quadratic that does not cancel.

    Args:
        x: Where to evaluate.
        widths: Logits of the bins' shares of `[-bound, bound]` on the input side.
        heights: The same on the output side.
        slopes: Unconstrained slopes at the inner knots; the outer two are 1, to meet the
            identity with a continuous derivative.
        bound: Half the width of the box.
        inverse: Whether to invert the spline.

    Returns:
        The mapped values and the log of the derivative of the map that was applied.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import rational_quadratic_spline
        >>> widths, heights, slopes = jnp.zeros((2, 4)), jnp.ones((2, 4)), jnp.zeros((2, 3))
        >>> y, log_slope = rational_quadratic_spline(
        ...     jnp.array([0.5, 7.0]), widths, heights, slopes, bound=3.0
        ... )
        >>> [round(float(value), 3) for value in y]
        [0.5, 7.0]
        >>> bool(jnp.all(jnp.abs(log_slope) < 1e-5))
        True
    """
    # Values outside are evaluated on the edge and then discarded, so that the branch not taken
    # has finite derivatives.
    outside = jnp.abs(x) > bound
    inside = jnp.clip(x, -bound, bound)
    knots = _knots(jnp.stack([widths, heights]), bound)
    inner = _positive(slopes)
    edge = jnp.ones_like(inner[..., :1])
    index = jnp.sum(inside[..., None] >= knots[int(inverse), ..., 1:-1], axis=-1, keepdims=True)
    # A product with a one-hot vector selects the bin: its derivative is a product too, where that
    # of a gather is a scatter.
    index, bins = equal_rank(index, jnp.arange(widths.shape[-1]))
    one_hot = (index == bins).astype(knots.dtype)
    ends = [
        *knots[..., :-1],
        *jnp.diff(knots),
        jnp.concatenate([edge, inner], axis=-1),
        jnp.concatenate([inner, edge], axis=-1),
    ]
    x_left, y_left, width, height, slope_left, slope_right = jnp.sum(
        one_hot[None] * jnp.stack(ends), axis=-1
    )
    secant = height / width
    excess = slope_left + slope_right - 2.0 * secant
    if inverse:
        rise = inside - y_left
        a = height * (secant - slope_left) + rise * excess
        b = height * slope_left - rise * excess
        c = secant * rise
        root = jnp.sqrt(jnp.maximum(b * b + 4.0 * a * c, jnp.finfo(b.dtype).tiny))
        theta = jnp.clip(2.0 * c / (b + root), 0.0, 1.0)
    else:
        theta = (inside - x_left) / width
    mixed = theta * (1.0 - theta)
    denominator = secant + excess * mixed
    log_slope = (
        2.0 * jnp.log(secant)
        + jnp.log(slope_right * theta**2 + 2.0 * secant * mixed + slope_left * (1.0 - theta) ** 2)
        - 2.0 * jnp.log(denominator)
    )
    if inverse:
        mapped, log_slope = x_left + theta * width, -log_slope
    else:
        mapped = y_left + height * (secant * theta**2 + slope_left * mixed) / denominator
    return jnp.where(outside, x, mapped), jnp.where(outside, 0.0, log_slope)


def _knots(logits: Array, bound: float) -> Array:
    """Turn unconstrained bin sizes into increasing knots from exactly `-bound` to `bound`."""
    num_bins = logits.shape[-1]
    share = _MIN_BIN_SHARE + (1.0 - _MIN_BIN_SHARE * num_bins) * jax.nn.softmax(logits)
    inner = bound * (2.0 * jnp.cumsum(share, axis=-1)[..., :-1] - 1.0)
    edge = jnp.full_like(inner, bound, shape=(*inner.shape[:-1], 1))
    return jnp.concatenate([-edge, inner, edge], axis=-1)


def _positive(raw: Array) -> Array:
    """Map the reals to slopes above the smallest one allowed, 0 to 1."""
    shift = math.log(math.expm1(1.0 - _MIN_SLOPE))
    return _MIN_SLOPE + jax.nn.softplus(raw + shift)


def bounded_input(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Bring a network's inputs within (-5, 5), smoothly and nearly unchanged in the bulk.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import bounded_input
        >>> [round(float(x), 2) for x in bounded_input(jnp.array([-1e3, 0.0, 1.0]))]
        [-5.0, 0.0, 0.98]
    """
    return x / jnp.sqrt(1.0 + (x / _MAX_INPUT) ** 2)


def bounded_log_scale(raw: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Bring log scales within (-3, 3), smoothly and unchanged near zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import bounded_log_scale
        >>> bounded_log_scale(jnp.array([-1e3, 0.0])).tolist()
        [-3.0, 0.0]
    """
    return _soft_clip(raw, _MAX_LOG_SCALE)


def _soft_clip(raw: Array, limit: float) -> Array:
    """Bound values smoothly by `limit`; near zero this is the identity."""
    return limit * jnp.tanh(raw / limit)


class Conditioner(eqx.Module):
    """A small dense network with SiLU units, whose output is exactly zero when it is new.

    The last layer's product is divided by the square root of its width. An optimiser with steps
    of fixed size (Adam) moves all weights of a new last layer the same way at once; undamped, a
    few such steps throw a flow of several layers to where a model overflows.

    Attributes:
        weights: One `(in, out)` matrix for each layer.
        biases: One `(out,)` vector for each layer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import Conditioner
        >>> network = Conditioner.create(jax.random.key(0), 2, (8,), 3)
        >>> network(jnp.ones(2)).tolist()
        [0.0, 0.0, 0.0]
    """

    weights: tuple[Float[Array, "_in _out"], ...]
    biases: tuple[Float[Array, " _out"], ...]

    @classmethod
    def create(
        cls, key: PRNGKeyArray, num_inputs: int, hidden_dims: tuple[int, ...], num_outputs: int
    ) -> Conditioner:
        """Draw a network; without inputs it is a constant, so that it has no hidden layers."""
        sizes = (num_inputs, *(hidden_dims if num_inputs else ()), num_outputs)
        keys = jax.random.split(key, len(sizes))
        shapes = list(pairwise(sizes))
        weights = [
            jax.random.normal(k, shape) / math.sqrt(max(shape[0], 1))
            for k, shape in zip(keys[:-1], shapes, strict=True)
        ]
        weights[-1] = jnp.zeros(shapes[-1])
        return cls(tuple(weights), tuple(jnp.zeros(size) for size in sizes[1:]))

    def __call__(self, x: Float[Array, "*batch _in"]) -> Float[Array, "*batch _out"]:
        """Evaluate the network on a batch of vectors."""
        *hidden, last = zip(self.weights, self.biases, strict=True)
        batch = (1,) * (x.ndim - 1)
        for weight, bias in hidden:
            x = jax.nn.silu(x @ weight + bias.reshape(*batch, -1))
        return x @ last[0] / math.sqrt(max(last[0].shape[0], 1)) + last[1].reshape(*batch, -1)


class CouplingLayer(eqx.Module):
    """One coupling layer: the active coordinates, mapped given the passive ones and a context.

    Attributes:
        conditioner: The network from passive coordinates and context to the scalar maps.
        passive: Indices of the coordinates that pass unchanged.
        active: Indices of the coordinates that are mapped.
        kind: The scalar map, `"affine"` or `"spline"`.
        num_bins: Bins of the spline.
        bound: Half the width of the spline's box.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import Conditioner, CouplingLayer
        >>> network = Conditioner.create(jax.random.key(0), 1, (4,), 2)
        >>> layer = CouplingLayer(network, passive=(0,), active=(1,), kind="affine")
        >>> layer.forward(jnp.array([1.0, 2.0]))[0].tolist()
        [1.0, 2.0]
    """

    conditioner: Conditioner
    passive: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    kind: CouplingKind = eqx.field(static=True)
    num_bins: int = eqx.field(static=True, default=8)
    bound: float = eqx.field(static=True, default=4.0)

    def forward(
        self, x: Float[Array, "*batch dim"], context: Float[Array, "*batch _"] | None = None
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map `x`; return the image and the log-determinant of the Jacobian."""
        kept, moved = x[..., np.array(self.passive, int)], x[..., np.array(self.active, int)]
        shift, log_scale, spline = self._maps(kept, context)
        log_det = log_scale
        if spline is not None:
            moved = jnp.broadcast_to(moved, log_scale.shape)
            moved, log_slope = rational_quadratic_spline(moved, *spline, bound=self.bound)
            log_det = log_scale + log_slope
        moved = shift + jnp.exp(log_scale) * moved
        return self._join(kept, moved), jnp.sum(log_det, axis=-1)

    def inverse(
        self, y: Float[Array, "*batch dim"], context: Float[Array, "*batch _"] | None = None
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Undo `forward`; return the preimage and the log-determinant of the inverse's Jacobian."""
        kept, moved = y[..., np.array(self.passive, int)], y[..., np.array(self.active, int)]
        shift, log_scale, spline = self._maps(kept, context)
        log_det = -log_scale
        moved = (moved - shift) * jnp.exp(-log_scale)
        if spline is not None:
            moved, log_slope = rational_quadratic_spline(
                moved, *spline, bound=self.bound, inverse=True
            )
            log_det = log_slope - log_scale
        return self._join(kept, moved), jnp.sum(log_det, axis=-1)

    def _maps(
        self, kept: Array, context: Array | None
    ) -> tuple[Array, Array, tuple[Array, Array, Array] | None]:
        """Evaluate the network: shift, log scale and spline of each active coordinate."""
        if context is not None:
            batch = jnp.broadcast_shapes(kept.shape[:-1], context.shape[:-1])
            parts = [jnp.broadcast_to(v, (*batch, v.shape[-1])) for v in (kept, context)]
            kept = jnp.concatenate(parts, axis=-1)
        raw = self.conditioner(bounded_input(kept))
        raw = raw.reshape(*raw.shape[:-1], len(self.active), -1)
        shift = raw[..., 0]
        log_scale = bounded_log_scale(raw[..., 1])
        if self.kind == "affine":
            return shift, log_scale, None
        logits = _soft_clip(raw[..., 2:], _MAX_SPLINE_LOGIT)
        widths, heights, slopes = jnp.split(logits, (self.num_bins, 2 * self.num_bins), axis=-1)
        return shift, log_scale, (widths, heights, slopes)

    def _join(self, kept: Array, moved: Array) -> Array:
        """Put passive and active coordinates back in their places."""
        kept = jnp.broadcast_to(kept, (*moved.shape[:-1], kept.shape[-1]))
        order = np.argsort(np.array(self.passive + self.active))
        return jnp.concatenate([kept, moved], axis=-1)[..., order]


class CouplingFlow(eqx.Module):
    """A stack of coupling layers that between them map every coordinate given every other.

    Layers come in pairs with opposite roles. Each pair splits the coordinates by its own fixed
    permutation, so that over the pairs any coordinate can depend on any other. In one dimension
    there is nothing to condition on but the context: each layer is then a plain scalar map (for
    `"affine"` without a context, the flow stays a linear map, hence Gaussian; take `"spline"`).

    When not to use it: where only samples, or only densities, are ever needed and the dimension is
    small, an autoregressive flow of the same size is more flexible.

    Attributes:
        layers: The coupling layers, in the order in which `forward` applies them.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.flows import CouplingFlow
        >>> flow = CouplingFlow.create(jax.random.key(0), 3, kind="spline", context_dim=2)
        >>> y, log_det = flow.forward(jnp.arange(3.0), jnp.ones(2))
        >>> bool(jnp.allclose(y, jnp.arange(3.0), atol=1e-5)), bool(abs(log_det) < 1e-5)
        (True, True)
    """

    layers: tuple[CouplingLayer, ...]

    @classmethod
    def create(
        cls,
        key: PRNGKeyArray,
        dim: int,
        *,
        kind: CouplingKind = "spline",
        num_layers: int = 4,
        hidden_dims: tuple[int, ...] = (32, 32),
        context_dim: int = 0,
        num_spline_layers: int | None = None,
        num_bins: int = 8,
        bound: float = 4.0,
    ) -> CouplingFlow:
        """Make a flow that is the identity.

        Args:
            key: Draws the networks' hidden weights; the splits of the coordinates are fixed.
            dim: Dimension of the space that is mapped.
            kind: `"affine"` or `"spline"`.
            num_layers: Coupling layers; an even number maps every coordinate equally often.
            hidden_dims: Hidden widths of each layer's network.
            context_dim: Length of the context vector, 0 for none.
            num_spline_layers: For `"spline"`, how many of the layers, counted from the base, have
                a spline; the rest are affine. By default all. Two (each coordinate once) already
                give skewed or many-peaked marginals, and train faster and closer than a stack of
                splines.
            num_bins: Bins of each spline.
            bound: Half the width of each spline's box, in units in which the base is standard
                normal.

        Raises:
            ValueError: For a kind that does not exist, or a size below its smallest value.
        """
        if kind not in get_args(CouplingKind):
            raise ValueError(f"kind must be 'affine' or 'spline', got {kind!r}")
        if not bound > 0.0:
            raise ValueError(f"bound must be positive, got {bound}")
        check_sizes(
            dim=(dim, 1),
            num_layers=(num_layers, 1),
            context_dim=(context_dim, 0),
            num_spline_layers=(1 if num_spline_layers is None else num_spline_layers, 1),
            # With one bin the spline has no inner knot, hence no parameter at all.
            num_bins=(num_bins, 2),
            **{f"hidden_dims[{i}]": (width, 1) for i, width in enumerate(hidden_dims)},
        )
        num_splines = num_layers if num_spline_layers is None else num_spline_layers
        return _create(
            key,
            dim,
            kind,
            num_layers,
            tuple(hidden_dims),
            context_dim,
            num_splines,
            num_bins,
            bound,
        )

    def forward(
        self, x: Float[Array, "*batch dim"], context: Float[Array, "*batch _"] | None = None
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map `x`; return the image and the log-determinant of the Jacobian."""
        return _forward(self, x, context)

    def inverse(
        self, y: Float[Array, "*batch dim"], context: Float[Array, "*batch _"] | None = None
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Undo `forward`; return the preimage and the log-determinant of the inverse's Jacobian."""
        return _inverse(self, y, context)


@partial(jax.jit, static_argnums=tuple(range(1, 9)))
def _create(
    key: PRNGKeyArray,
    dim: int,
    kind: CouplingKind,
    num_layers: int,
    hidden_dims: tuple[int, ...],
    context_dim: int,
    num_splines: int,
    num_bins: int,
    bound: float,
) -> CouplingFlow:
    layers = []
    keys = jax.random.split(key, num_layers)
    for number, (passive, active) in enumerate(_splits(dim, num_layers)):
        is_spline = kind == "spline" and number < num_splines
        num_maps = 2 + (3 * num_bins - 1 if is_spline else 0)
        network = Conditioner.create(
            keys[number], len(passive) + context_dim, hidden_dims, num_maps * len(active)
        )
        layer_kind: CouplingKind = "spline" if is_spline else "affine"
        layers.append(CouplingLayer(network, passive, active, layer_kind, num_bins, bound))
    return CouplingFlow(tuple(layers))


# Compiled as a whole, because NumPyro runs a guide once op by op before it compiles it, and some
# two hundred small compilations take longer than the training of a small model.
@jax.jit
def _forward(flow: CouplingFlow, x: Array, context: Array | None) -> tuple[Array, Array]:
    total = jnp.zeros(())
    for layer in flow.layers:
        x, log_det = layer.forward(x, context)
        total = total + log_det
    return x, total


@jax.jit
def _inverse(flow: CouplingFlow, y: Array, context: Array | None) -> tuple[Array, Array]:
    total = jnp.zeros(())
    for layer in reversed(flow.layers):
        y, log_det = layer.inverse(y, context)
        total = total + log_det
    return y, total


def _splits(dim: int, num_layers: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """List passive and active coordinates of each layer."""
    if dim == 1:
        return [((), (0,))] * num_layers
    splits = []
    for number in range(num_layers):
        pair, swapped = divmod(number, 2)
        order = np.arange(dim) if pair == 0 else np.random.default_rng(pair).permutation(dim)
        halves = (
            tuple(int(i) for i in order[: dim // 2]),
            tuple(int(i) for i in order[dim // 2 :]),
        )
        splits.append((halves[1], halves[0]) if swapped else halves)
    return splits


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Raise a `ValueError` naming the first size, given as `(size, smallest)`, that is too small.

    Example:
        >>> from numpyro_sde.guides.flows import check_sizes
        >>> check_sizes(num_layers=(0, 1))
        Traceback (most recent call last):
        ValueError: num_layers must be at least 1, got 0
    """
    for name, (size, smallest) in sizes.items():
        if size < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {size}")
