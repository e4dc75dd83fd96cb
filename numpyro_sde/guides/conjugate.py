r"""`AutoConjugate`: weights of fields given the other parameters, by the conjugate form.

The law of the weights w of a drift, given the other parameters, is their normal prior times a
normal likelihood, held as its natural parameters `Psi` (a precision) and `psi`:

    q(w | rest) = N(L^-1 psi, L^-1),   L = S(rest)^-1 + Psi,   psi = psi_0 + G (rest - rest_0),

with S the prior covariance at the amplitude and length that were drawn. So the funnel between these
and the weights is in the guide, whatever has been learned, and the bound of amplitude and length is
that with the weights integrated out. G lets the weights give way to what the drift has besides (a
known part with a parameter of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_median, init_to_value

from numpyro_sde.collapse import normal_weights
from numpyro_sde.fields.field import LinearField, recorded_fields
from numpyro_sde.guides.auto import AutoFlow
from numpyro_sde.guides.split import check_weights, hidden_sites, places_of
from numpyro_sde.models.stack import outside_all_handlers

ENGINE = "AutoConjugate"
# Weights whose prior sd is below this share of the largest begin without a likelihood: nothing
# could be told of them from where they were looked at.
_SEEN = 1e-2
# Ordinary parameters, unconstrained, up to which the weights are told of them.
_MOST_REST = 16


class Likelihood(NamedTuple):
    """A normal likelihood of weights, by its natural parameters.

    Attributes:
        pull: psi at the first values of the other parameters, `(m,)`.
        slope: G, its slope in the other parameters, unconstrained, `(m, p)`.
        root: a square root of Psi, `(m, m)`.
    """

    pull: Float[Array, " m"]
    slope: Float[Array, "m p"]
    root: Float[Array, "m m"]


class Weights(NamedTuple):
    """Weights in the order of a guide, given the other parameters: `loc + scale e`, e whitened.

    Attributes:
        loc: prior means of the sites' values, `(m,)`.
        scale: prior standard deviations of them.
        unit: what turns a site's value into a weight of the field: its prior standard deviation
            where the site is whitened, else one.
    """

    loc: Float[Array, " m"]
    scale: Float[Array, " m"]
    unit: Float[Array, " m"]


class Layout:
    """Sites of weights as one vector.

    Args:
        values: of the sites, in the vector's order.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.shapes = {name: jnp.shape(value) for name, value in values.items()}

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(int(np.prod(shape, dtype=int)) for shape in self.shapes.values())

    def split(self, flat: Float[Array, " m"]) -> dict[str, Array]:
        """Values of the sites."""
        sizes = [int(np.prod(shape, dtype=int)) for shape in self.shapes.values()]
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        return {
            name: jnp.reshape(part, shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def joined(self, values: Mapping[str, Array]) -> Float[Array, " m"]:
        """The vector of values of the sites."""
        return jnp.concatenate([jnp.ravel(values[name]) for name in self.shapes])


def root_of(Psi: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """A square root of the nearest matrix without negative directions."""
    size, vectors = jnp.linalg.eigh(0.5 * (Psi + Psi.T))
    return vectors * jnp.sqrt(jnp.maximum(size, 0.0))[None]


class AutoConjugate(AutoGuide):
    r"""A flow over ordinary parameters; over weights of fields the prior times a normal likelihood.

    Args:
        model: a model, all of its latent sites continuous.
        weights: names of the sites that hold weights, such as `"f/z"`, with independent normal
            priors and in no plate; those of several fields have one joint law.
        prefix: put before the names of the parameters: `{prefix}_weights_pull` for psi_0, `(m,)`,
            `{prefix}_weights_slope` for G, `(m, p)` for p other parameters (none where they are
            more than 16), and `{prefix}_weights_root` for a square root of Psi, `(m, m)`.
        **options: keyword arguments of `AutoFlow`, for the rest.

    Raises:
        ValueError: no weights; when used, names that are no latent sites, other priors, a plate.

    `SVI` trains it by gradients, and `nsde.guides.fit_conjugate` by the conjugate update.

    Source: Khan and Lin (2017), "Conjugate-computation variational inference".

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     f = nsde.fields.HSGP(1, 2.0, 60).register(
        ...         "f", amplitude=dist.HalfNormal(1.0), length=0.5)
        ...     numpyro.sample("y", dist.Normal(f(0.3), 0.1), obs=0.5)
        >>> guide = nsde.guides.AutoConjugate(model, ["f/z"])
        >>> svi = numpyro.infer.SVI(
        ...     model, guide, numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO())
        >>> fit = svi.run(jax.random.key(0), 5, progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(3,))["f/z"].shape
        (3, 60)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        weights: Sequence[str],
        *,
        prefix: str = "auto",
        **options: Any,
    ) -> None:
        self.weights = check_weights(weights)
        super().__init__(model, prefix=prefix, init_loc_fn=init_to_median)
        self._options = options
        self._flow_scale: Any = 0.1
        self._mode: tuple[dict[str, Array], Array | None] = ({}, None)
        self.rest: AutoFlow | None = None
        self.layout = Layout({})
        self._call: tuple[Any, Any] = ((), {})
        self._supports: dict[str, Any] = {}
        self._rest_start = np.zeros(0)

    def start_at(
        self, values: Mapping[str, Array], names: Sequence[str], covariance: Array, sizes: Any
    ) -> None:
        """Begin at values of the sites, with a covariance of their unconstrained coordinates.

        Args:
            values: by site.
            names: sites in the order of the covariance.
            covariance: `(D, D)`.
            sizes: number of unconstrained coordinates of each site.
        """
        places = places_of(names, sizes)
        rest = tuple(name for name in names if name not in self.weights)
        kept = np.concatenate([places[n] for n in rest]) if rest else np.zeros(0, int)
        own = np.concatenate([places[n] for n in self.weights])
        covariance = jnp.asarray(covariance)
        self._flow_scale = {rest: covariance[np.ix_(kept, kept)]}
        precision = jnp.linalg.inv(covariance)[np.ix_(own, own)]
        self._mode = dict(values), precision
        self.init_loc_fn = init_to_value(values=dict(values))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        sites = self.prototype_trace
        latent = [
            name
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        ]
        missing = sorted(set(self.weights) - set(latent))
        if missing:
            raise ValueError(f"{ENGINE}: {missing} are no latent sites, which are {latent}")
        for name in self.weights:
            normal_weights(sites[name], ENGINE)
            if sites[name]["cond_indep_stack"]:
                raise ValueError(
                    f"{ENGINE} takes weights that all series share, and {name!r} stands in plate "
                    f"{sites[name]['cond_indep_stack'][0].name!r}"
                )
        self.layout = Layout({name: sites[name]["value"] for name in self.weights})
        self._supports = {
            name: sites[name]["fn"].support
            for name in latent
            if name not in self.weights and not sites[name]["cond_indep_stack"]
        }
        values = {name: sites[name]["value"] for name in self._supports}
        first = self._vector({**values, **self._mode[0]})
        if first.size > _MOST_REST:
            self._supports, first = {}, jnp.zeros(0)
        # A start that is known only inside a trace must not outlive it.
        traced = isinstance(first, jax.core.Tracer)
        self._rest_start = np.zeros(first.shape) if traced else np.asarray(first)
        if len(latent) > len(self.weights):
            self.rest = AutoFlow(
                partial(hidden_sites, self.model, self.weights),
                prefix=self.prefix,
                init_loc_fn=self.init_loc_fn,
                init_scale=self._flow_scale,
                **self._options,
            )
            self.rest.create_plates = self.create_plates
        self._call = args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Sample all sites; arguments as for the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        values = {} if self.rest is None else dict(self.rest(*args, **kwargs))
        at = self.weights_given(values, args, kwargs)
        mean, precision = self._law(at, self.rest_vector(values), self._likelihood())
        law = dist.MultivariateNormal(mean, precision_matrix=precision)
        auxiliary = {"is_auxiliary": True}
        e = numpyro.sample(f"_{self.prefix}_weights", law, infer=auxiliary)
        jacobian = -jnp.sum(jnp.log(at.scale))
        for name, value in self.layout.split(at.loc + at.scale * e).items():
            numpyro.sample(name, dist.Delta(value, jacobian, event_dim=jnp.ndim(value)))
            values[name] = value
            jacobian = jnp.zeros(())
        return values

    def weights_given(self, values: Mapping[str, Array], args: Any, kwargs: Any) -> Weights:
        """The weights' prior given the other parameters, by a run of the model aside."""
        stand_ins = self.layout.split(jnp.zeros(self.layout.size))
        known = substitute(data={**values, **stand_ins})
        recorder = trace()
        with recorded_fields() as fields, outside_all_handlers(), recorder, seed(rng_seed=0), known:
            self.model(*args, **kwargs)
        found = []
        for name in self.weights:
            prior = normal_weights(recorder.trace[name], ENGINE)
            field = fields.get(name.rpartition("/")[0])
            if isinstance(field, LinearField) and name.endswith("/z"):
                unit = field.weight_sd
            else:
                unit = jnp.ones_like(prior.scale)
            found.append([jnp.ravel(a) for a in (prior.loc, prior.scale, unit)])
        return Weights(*(jnp.concatenate(parts) for parts in zip(*found, strict=True)))

    def rest_vector(self, values: Mapping[str, Array]) -> Float[Array, " p"]:
        """The other parameters, unconstrained, less their first values."""
        vector = self._vector(values)
        return vector - jnp.asarray(self._rest_start, vector.dtype)

    def _vector(self, values: Mapping[str, Array]) -> Array:
        parts = [
            jnp.ravel(biject_to(support).inv(jnp.asarray(values[name])))
            for name, support in self._supports.items()
        ]
        return jnp.concatenate([jnp.zeros(0), *parts]).astype(jnp.result_type(float))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that make the likelihood, in its order."""
        return tuple(f"{self.prefix}_weights_{one}" for one in Likelihood._fields)

    def _likelihood(self) -> Likelihood:
        """Register the likelihood's parameters."""
        parts = [
            numpyro.param(name, lambda _, i=i: self._first()[i])
            for i, name in enumerate(self.names)
        ]
        return Likelihood(*parts)

    def _first(self) -> Likelihood:
        """The likelihood to begin with: of the mode and the curvature there."""
        values, precision = self._mode
        size = self.layout.size
        slope = jnp.zeros((size, self._rest_start.size))
        if precision is None:
            return Likelihood(jnp.zeros(size), slope, 0.1 * jnp.eye(size))
        rest = {k: v for k, v in values.items() if k not in self.weights}
        loc, scale, unit = self.weights_given(rest, *self._call)
        e, sd = (self.layout.joined(values) - loc) / scale, scale * unit
        J = scale[:, None] * precision * scale[None] - jnp.eye(e.size)
        # What a weight of hardly any prior variance said there would be lost in division.
        over = sd / (sd**2 + (_SEEN * sd.max()) ** 2)
        root = root_of(over[:, None] * J * over[None])
        return Likelihood(over * e + root @ (root.T @ (loc * unit + sd * e)), slope, root)

    def _law(self, at: Weights, rest: Array, likelihood: Likelihood) -> tuple[Array, Array]:
        """Mean and precision of the whitened weights."""
        root, sd = likelihood.root, at.scale * at.unit
        half = sd[:, None] * root
        precision = jnp.eye(sd.size, dtype=half.dtype) + half @ half.T
        pull = likelihood.pull + likelihood.slope @ rest
        natural = sd * pull - half @ (root.T @ (at.loc * at.unit))
        factor = jnp.linalg.cholesky(precision)
        return jax.scipy.linalg.cho_solve((factor, True), natural), precision

    def sample_posterior(
        self,
        rng_key: PRNGKeyArray,
        params: Mapping[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draw all sites; arguments as for NumPyro's guides."""

        def draw(key: PRNGKeyArray) -> dict[str, Array]:
            with block(), seed(rng_seed=key), substitute(data=dict(params)):
                return self(*args, **kwargs)

        if not args and not kwargs:
            args, kwargs = self._call
        keys = jax.random.split(rng_key, int(np.prod(sample_shape, dtype=int)))
        drawn = jax.lax.map(draw, keys, batch_size=min(len(keys), 64))
        return {k: jnp.reshape(v, sample_shape + v.shape[1:]) for k, v in drawn.items()}

    def median(self, params: Mapping[str, Any]) -> dict[str, Array]:
        """Medians of the other parameters, and the weights' at these."""
        rest = {} if self.rest is None else dict(self.rest.median(dict(params)))
        at = self.weights_given(rest, *self._call)
        likelihood = Likelihood(*(params[name] for name in self.names))
        e = self._law(at, self.rest_vector(rest), likelihood)[0]
        return {**rest, **self.layout.split(at.loc + at.scale * e)}
