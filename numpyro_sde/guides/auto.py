"""`AutoFlow`: a NumPyro automatic guide whose posterior is a normalizing flow.

The posterior of the model's latent sites, in their unconstrained space, is the law of
`loc + scale_tril @ flow(z)`, `z ~ N(0, I)`. The flow starts at (or, for `"bnaf"`, near) the
identity, so that training starts as `AutoMultivariateNormal` does, at a narrow Gaussian around
`init_loc_fn`, and what it finds can only refine that family.

The coupling flows are our own (`numpyro_sde.guides.flows`); `"iaf"` (Kingma et al. 2016,
arXiv:1606.04934) and `"bnaf"` (De Cao, Titov, Aziz 2019, arXiv:1904.04676) are NumPyro's
networks and transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import constraints
from numpyro.distributions.flows import (
    BlockNeuralAutoregressiveTransform,
    InverseAutoregressiveTransform,
)
from numpyro.distributions.transforms import (
    AffineTransform,
    IndependentTransform,
    LowerCholeskyAffine,
    PermuteTransform,
    Transform,
)
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median
from numpyro.nn import AutoregressiveNN, BlockNeuralAutoregressiveNN
from scipy.special import ndtri

from numpyro_sde.describe import html_text
from numpyro_sde.guides.flows import (
    CouplingFlow,
    CouplingKind,
    bounded_input,
    bounded_log_scale,
    check_sizes,
)
from numpyro_sde.guides.transforms import CouplingTransform
from numpyro_sde.reparam.path import pinned_innovations

FlowName = Literal["spline", "affine", "iaf", "bnaf"]

_DEFAULT_LAYERS: dict[str, int] = {"spline": 6, "affine": 6, "iaf": 4, "bnaf": 1}
# Above this many dimensions a full matrix has more entries than the default flow's networks.
_FULL_COVARIANCE_MAX_DIM = 256
# sigmoid(-2) = 0.12: a gated layer of a new "bnaf" is mostly its identity branch.
_BNAF_GATE = -2.0


class AutoFlow(AutoContinuous):
    r"""A normalizing flow over all continuous latent sites of a model, as an automatic guide.

    Works wherever a NumPyro guide does: `SVI`, `Predictive(model, guide=guide, params=params)`,
    `sample_posterior`, `median`, `quantiles`, `get_transform` and `get_posterior` (so also
    `NeuTraReparam`). Latent sites are ordered as NumPyro's own `AutoContinuous` guides order them.

    | `flow` | density at a given point | `num_flows` | `hidden_dims` | parameters |
    | --- | --- | --- | --- | --- |
    | `"spline"` | one pass | 6 layers | `(32, 32)` | O(`num_flows` d w (w + bins)) |
    | `"affine"` | one pass | 6 layers | `(32, 32)` | O(`num_flows` d w) |
    | `"iaf"` | d passes | 4 | two of max(32, 2 d) | O(`num_flows` d^2) |
    | `"bnaf"` | not available | 1 | `(8, 8)` units for each dimension | O(`num_flows` 64 d^2) |

    When not to use it: with subsampled plates that hold latent sites (it raises; use NumPyro's
    `AutoSemiDAIS` or `AutoNormal`), and in hundreds of dimensions with `"bnaf"`.

    Args:
        model: A NumPyro model whose latent sites are all continuous.
        flow: `"spline"`, `"affine"`, `"iaf"` or `"bnaf"`.
        num_flows: Layers; by default as in the table.
        hidden_dims: Hidden widths of each layer's network; by default as in the table.
        covariance: Linear layer on top of the flow: `"full"` or `"diagonal"`; by default full up
            to 256 dimensions.
        num_bins: Bins of each spline.
        bound: Half the width of each spline's box, in standard deviations of the base.
        prefix: Put before the name of each parameter: `{prefix}_loc`, `{prefix}_scale_tril` (or
            `{prefix}_scale`), `{prefix}_flow` (or `{prefix}_arn__{i}$params`).
        init_loc_fn: NumPyro's initialisation strategy, which gives the initial `loc`.
        init_scale: Initial standard deviation of each unconstrained coordinate, except that
            innovations of a guided path or of a bridge begin at their prior's, 1, which is near
            their posterior's; or the initial covariance of all coordinates `(D, D)` in blocks of
            sites, `{("rate", "scale"): covariance}`, as NumPyro's kernels take
            `inverse_mass_matrix`.
        num_quantile_draws: Size, a power of two, of the fixed set of draws behind `median` and
            `quantiles`.
        forward_mode_differentiation: As in NumPyro's `AutoContinuous`.

    Raises:
        ValueError: At construction, for an unknown flow or covariance or a size that is not
            positive; at the first call, for a discrete latent site, a latent site in a subsampled
            plate, or a single latent dimension with `"iaf"` or `"bnaf"`.

    Example:
        >>> import jax
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_sde.guides import AutoFlow
        >>> def model():
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     numpyro.sample("count", dist.Poisson(rate), obs=3)
        >>> guide = AutoFlow(model, num_flows=2)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=8))
        >>> fit = svi.run(jax.random.key(0), 300, progress_bar=False)
        >>> draws = guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(100,))
        >>> draws["rate"].shape, bool(draws["rate"].min() > 0)
        ((100,), True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        flow: FlowName = "spline",
        num_flows: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        covariance: Literal["full", "diagonal"] | None = None,
        num_bins: int = 8,
        bound: float = 4.0,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float | Mapping[tuple[str, ...], ArrayLike] = 0.1,
        num_quantile_draws: int = 8192,
        forward_mode_differentiation: bool = False,
    ) -> None:
        if flow not in get_args(FlowName):
            raise ValueError(f"flow must be one of {', '.join(get_args(FlowName))}, got {flow!r}")
        if covariance not in (None, "full", "diagonal"):
            raise ValueError(f"covariance must be 'full' or 'diagonal', got {covariance!r}")
        if not isinstance(init_scale, Mapping) and not init_scale > 0.0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        if num_quantile_draws < 1 or num_quantile_draws & (num_quantile_draws - 1):
            raise ValueError(f"num_quantile_draws must be a power of two, got {num_quantile_draws}")
        self.flow = flow
        self.num_flows = _DEFAULT_LAYERS[flow] if num_flows is None else num_flows
        self.hidden_dims = None if hidden_dims is None else tuple(hidden_dims)
        check_sizes(
            num_flows=(self.num_flows, 1),
            num_bins=(num_bins, 2),
            **{f"hidden_dims[{i}]": (w, 1) for i, w in enumerate(self.hidden_dims or ())},
        )
        if not bound > 0.0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.covariance = covariance
        self.num_bins = num_bins
        self.bound = bound
        self.init_scale = init_scale
        self.num_quantile_draws = num_quantile_draws
        super().__init__(
            model,
            prefix=prefix,
            init_loc_fn=init_loc_fn,
            forward_mode_differentiation=forward_mode_differentiation,
        )

    def __repr__(self) -> str:
        return f"AutoFlow(flow={self.flow!r}, num_flows={self.num_flows})"

    def _repr_html_(self) -> str:
        return html_text(repr(self))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # Before NumPyro's own set-up, which would try to enumerate a discrete site.
        with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
            drawn = numpyro.handlers.trace(self.model).get_trace(*args, **kwargs)
        for name, site in drawn.items():
            latent = site["type"] == "sample" and not site["is_observed"]
            if latent and site["fn"].support.is_discrete:
                raise ValueError(
                    f"AutoFlow needs continuous latent sites, and latent site {name!r} is discrete "
                    f"({type(site['fn']).__name__}); sum it out of the model, or sample it by MCMC"
                )
        self._pinned = pinned_innovations(drawn)
        super()._setup_prototype(*args, **kwargs)
        if self.latent_dim == 1 and self.flow in ("iaf", "bnaf"):
            # Forget the prototype: the next call must meet this check again.
            self.prototype_trace = None
            raise ValueError(
                f"flow={self.flow!r} needs at least 2 latent dimensions and the model has 1: an "
                "autoregressive flow has nothing to condition on; use flow='spline'"
            )
        if self.flow == "iaf" and min(self.hidden_dims or (self.latent_dim,)) < self.latent_dim:
            self.prototype_trace = None
            raise ValueError(
                "hidden_dims of flow='iaf' must each be at least "
                f"{self.latent_dim}, the number of latent dimensions, got {self.hidden_dims}"
            )

    def _get_posterior(self) -> dist.TransformedDistribution:
        if self.flow == "iaf":
            layers = self._iaf_layers()
        elif self.flow == "bnaf":
            layers = self._bnaf_layers()
        else:
            layers = self._coupling_layers(self.flow)
        return dist.TransformedDistribution(self.get_base_dist(), [*layers, self._linear_layer()])

    def get_base_dist(self) -> dist.Distribution:
        """Return the standard normal that the flow starts from, event shape `(latent_dim,)`."""
        return dist.Normal(jnp.zeros(self.latent_dim), 1.0).to_event(1)

    def median(self, params: dict[str, Any]) -> dict[str, Array]:
        """Return the posterior median of each latent site; see `quantiles` for its accuracy.

        Args:
            params: The fitted parameters, as `SVI.get_params` gives them.

        Example:
            >>> import jax, numpyro
            >>> import numpyro.distributions as dist
            >>> from numpyro_sde.guides import AutoFlow
            >>> guide = AutoFlow(lambda: numpyro.sample("x", dist.Normal(2.0, 1.0)))
            >>> with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
            ...     _ = guide()
            >>> params = {k: v["value"] for k, v in trace.items() if v["type"] == "param"}
            >>> abs(float(guide.median(params)["x"]) - float(params["auto_loc"][0])) < 1e-3
            True
        """
        return {name: value[0] for name, value in self.quantiles(params, [0.5]).items()}

    def quantiles(
        self, params: dict[str, Any], quantiles: Sequence[float] | Float[Array, " num"]
    ) -> dict[str, Array]:
        """Return posterior quantiles of each latent site, with a new leading axis over them.

        As in NumPyro's guides, quantiles are those of each unconstrained coordinate, then mapped
        to the site's support: for sites constrained coordinate by coordinate they are the
        marginal quantiles, for the others (a simplex, a Cholesky factor) a point in the support.

        A flow's marginals have no closed form. They are taken from `num_quantile_draws` fixed
        quasi-random draws (a shifted Sobol sequence), so that the answer is a deterministic,
        differentiable function of `params`. Its standard error is at most that of as many
        independent draws, `sqrt(q (1 - q) / num_quantile_draws)` over the density at the
        quantile: for a near-normal marginal and 8192 draws, 0.014 sd at the median and 0.023 sd
        at 5 and 95 %.

        Args:
            params: The fitted parameters, as `SVI.get_params` gives them.
            quantiles: Probabilities between 0 and 1.
        """
        transform = self.get_transform(params)
        base = jnp.asarray(_normal_draws(self.num_quantile_draws, self.latent_dim))
        # In batches: 8192 draws at once can be gigabytes of hidden units.
        draws = jax.lax.map(transform, base, batch_size=min(1024, self.num_quantile_draws))
        latent = jnp.quantile(draws, jnp.asarray(quantiles), axis=0)
        return self._unpack_and_constrain(latent, params)

    def _linear_layer(self) -> Transform:
        """Location and scale on top of the flow."""
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        covariance = self.covariance
        if covariance is None:
            covariance = "full" if self.latent_dim <= _FULL_COVARIANCE_MAX_DIM else "diagonal"
        if covariance == "diagonal":
            scale = numpyro.param(
                f"{self.prefix}_scale",
                jnp.sqrt(jnp.sum(self._init_factor() ** 2, axis=1)),
                constraint=constraints.softplus_positive,
            )
            return IndependentTransform(AffineTransform(loc, scale), 1)
        scale_tril = numpyro.param(
            f"{self.prefix}_scale_tril",
            self._init_factor(),
            constraint=constraints.scaled_unit_lower_cholesky,
        )
        return LowerCholeskyAffine(loc, scale_tril)

    def _init_factor(self) -> Float[Array, "latent latent"]:
        """Lower factor of the initial covariance, sites in the guide's order."""
        sizes = {name: int(np.size(loc)) for name, loc in self._init_locs.items()}
        if not isinstance(self.init_scale, Mapping):
            sds = [1.0 if name in self._pinned else self.init_scale for name in sizes]
            return jnp.diag(jnp.repeat(jnp.array(sds), np.array(list(sizes.values()))))
        named = [name for names in self.init_scale for name in names]
        if sorted(named) != sorted(sizes):
            raise ValueError(
                f"init_scale must have each of {sorted(sizes)} once, got {sorted(named)}"
            )
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        covariance = jnp.zeros((self.latent_dim, self.latent_dim))
        for names, block in self.init_scale.items():
            where = np.concatenate([starts[name] + np.arange(sizes[name]) for name in names])
            if jnp.shape(block) != (where.size, where.size):
                raise ValueError(
                    f"init_scale of {names} must have shape {(where.size, where.size)}, got "
                    f"{jnp.shape(block)}"
                )
            covariance = covariance.at[np.ix_(where, where)].set(jnp.asarray(block))
        return jnp.linalg.cholesky(covariance)

    def _coupling_layers(self, kind: CouplingKind) -> list[Transform]:
        create = partial(
            CouplingFlow.create,
            dim=self.latent_dim,
            kind=kind,
            num_layers=self.num_flows,
            num_spline_layers=min(2, self.num_flows),
            hidden_dims=(32, 32) if self.hidden_dims is None else self.hidden_dims,
            num_bins=self.num_bins,
            bound=self.bound,
        )
        return [CouplingTransform(numpyro.param(f"{self.prefix}_flow", create))]

    def _iaf_layers(self) -> list[Transform]:
        dim = self.latent_dim
        hidden_dims = [max(32, 2 * dim)] * 2 if self.hidden_dims is None else self.hidden_dims
        networks = [
            _identity_iaf(AutoregressiveNN(dim, hidden_dims, nonlinearity=stax.Elu))
            for _ in range(self.num_flows)
        ]
        return self._interleave(networks, InverseAutoregressiveTransform)

    def _bnaf_layers(self) -> list[Transform]:
        hidden_dims = (8, 8) if self.hidden_dims is None else self.hidden_dims
        networks = [
            _near_identity_bnaf(
                BlockNeuralAutoregressiveNN(self.latent_dim, list(hidden_dims), residual="gated")
            )
            for _ in range(self.num_flows)
        ]
        return self._interleave(networks, BlockNeuralAutoregressiveTransform)

    def _interleave(
        self, networks: list[tuple[Callable, Callable]], make: Callable[..., Transform]
    ) -> list[Transform]:
        """Register NumPyro's networks; reverse the coordinates between their layers."""
        layers: list[Transform] = []
        for number, network in enumerate(networks):
            if number:
                layers.append(PermuteTransform(jnp.arange(self.latent_dim)[::-1]))
            name = f"{self.prefix}_arn__{number}"
            layers.append(make(numpyro.module(name, network, (self.latent_dim,))))
        return layers


def _identity_iaf(network: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    """Start an autoregressive network at zero shift and log scale, and keep its tails tame.

    Its last layer starts at zero. Inputs, log scales and the last layer's product are bounded and
    damped as in our own coupling layers (`numpyro_sde.guides.flows`), for the same reason: with
    the bare network, Adam's first steps reach draws at which hierarchical models overflow.
    """
    init, apply = network

    def init_at_identity(key: Array, input_shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
        shape, params = init(key, input_shape)
        return shape, [*params[:-1], jax.tree.map(jnp.zeros_like, params[-1])]

    def apply_bounded(params: list[Any], inputs: Array, **kwargs: Any) -> tuple[Array, Array]:
        weight, bias = params[-1]
        damped = [*params[:-1], (weight / math.sqrt(weight.shape[0]), bias)]
        shift, log_scale = apply(damped, bounded_input(inputs), **kwargs)
        return shift, bounded_log_scale(log_scale)

    return init_at_identity, apply_bounded


def _near_identity_bnaf(network: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    """Start a gated block network near its identity branch: its last parameter is the gate."""
    init, apply = network

    def init_near_identity(key: Array, input_shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
        shape, params = init(key, input_shape)
        return shape, [*params[:-1], jnp.full_like(params[-1], _BNAF_GATE)]

    return init_near_identity, apply


def _normal_draws(num_draws: int, dim: int) -> Float[np.ndarray, "draws dim"]:
    """Give the same quasi-random standard normal draws at each call."""
    from scipy.stats import qmc  # slow to import

    rng = np.random.default_rng(20191906)
    if dim > qmc.Sobol.MAXDIM:
        return rng.standard_normal((num_draws, dim))
    points = qmc.Sobol(dim, scramble=False).random_base2(num_draws.bit_length() - 1)
    # A random shift keeps the sequence's uniformity and takes its first point off the corner.
    points = (points + rng.random(dim)) % 1.0
    return ndtri(np.clip(points, 1e-12, 1.0 - 1e-12))
