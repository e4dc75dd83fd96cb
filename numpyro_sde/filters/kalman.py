"""The Kalman filter of a linear SDE with linear-Gaussian observations: exact, no time step."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.filters.forced import (
    forced_rows,
    forced_transitions,
    is_forced,
    path_varies_inside,
    varies_inside,
    why_not_linear,
)
from numpyro_sde.linear import diffuse, discretize, kalman
from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.rows import put_rows, take_rows
from numpyro_sde.linear.small import diagonal
from numpyro_sde.linear.smoothing import BackwardKernel, backward_kernels
from numpyro_sde.schemes import LocalLinear
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.schemes.matched_jumps import MatchedJumps
from numpyro_sde.schemes.time_varying import TimeVaryingLinear
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, Instrument, StateSpaceModel


class _Arrays(NamedTuple):
    """A linear-Gaussian model at the grid indices `rows`, with its data."""

    model: kalman.LinearGaussian
    y: Array
    present: Any
    rows: Any


class Kalman(AbstractFilter):
    """Exact filter of a linear-Gaussian model.

    Whether the model is one is found by tracing: the drift must be affine in the state, the
    diffusion free of it; the emission normal, its mean affine in the state and its covariance
    free of it. The SDE is then discretised exactly, whatever the gaps between the data.

    Coefficients that change with time are integrated over the steps of the path's grid to 2e-8
    (float32: 2e-6) of their size; where a step is too long for that the likelihood is NaN, and
    `TimeGrid(times, max_step)` gives the path shorter ones. A coefficient that jumps in time
    needs the jumps on the grid.

    Where a scheme was chosen for the path, its transitions are taken instead, on the path's
    grid: any scheme whose transition is normal for this SDE (`Euler`, `LocalLinear`, `Kessler`,
    `Exact` of a Gaussian process; `Milstein` and `Strang` where the SDE is linear with additive
    noise). Another one is refused.

    `init=dist.ImproperUniform(dist.constraints.real, (), ())`, a flat start of density 1 (for d
    states `constraints.real_vector` and event shape `(d,)`), is integrated out exactly: no large
    variance is put in its place. The log likelihood is that of `int p(y | x_0) dx_0`, the diffuse
    likelihood of de Jong (1991) and of Durbin and Koopman (2012) plus `d log(2 pi) / 2`; NaN where
    the data do not determine the first state.

    Args:
        form: "auto", "sequential", "sqrt" (square-root form, for ill-conditioned models and
            float32) or "parallel" (associative scan, for accelerators and long series).

    Raises:
        ValueError: an unknown form; later, in use, a model that is not linear-Gaussian.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.Kalman(form="sqrt").form
        'sqrt'
    """

    form: str = eqx.field(static=True)

    def __init__(self, form: str = "auto") -> None:
        kalman.choose_form(form, 1)
        self.form = form

    def check(self, model: StateSpaceModel) -> None:
        model = _discretized(model)
        if not model.init_gaussian and model.init_kind != "flat":
            _refuse(
                "init must be a normal distribution, a fixed state, or a flat one, "
                "dist.ImproperUniform(dist.constraints.real, (), state_shape)"
            )
        if model.init_kind == "flat" and model.markovian is not None:
            _refuse("a flat init is for Brownian motion; give the path a normal one")
        x = jax.ShapeDtypeStruct((model.dim,), jnp.result_type(float))
        if model.scheme_chosen:
            _check_scheme(model, x)
        for number, instrument in enumerate(model.instruments):
            _check_emission(instrument, number, x)

    def simulator(self, path: Any) -> Any:
        if path.scheme_chosen:
            return path
        if path.forcing is not None:
            smooth = path_varies_inside(path)
            return path.replace(scheme=TimeVaryingLinear() if smooth else LocalLinear())
        brownian = path.sde.noise.independent
        if brownian and path.sde.exact_transition() is not None:
            return path
        uses = (dependence(path.sde, role, path.state_shape) for role in ("drift", "diffusion"))
        varies = brownian and any(use.time for use in uses)
        # Both are exact where the SDE is linear.
        return path.replace(scheme=TimeVaryingLinear() if varies else LocalLinear())

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        model = _discretized(model)
        flat = model.init_kind == "flat"
        arrays = linear_arrays(model, _observed_rows(model), shared=not flat)
        engine = diffuse if flat else kalman
        return engine.log_likelihood(arrays.model, arrays.y, arrays.present, form=self.form)

    def increments(self, model: StateSpaceModel) -> Float[Array, " N"]:
        model = _discretized(model)
        arrays = linear_arrays(model, _observed_rows(model))
        result, _ = self._run(model, arrays)
        terms = result.increments
        return put_rows(terms, arrays.rows, model.num_times)

    def filter(self, model: StateSpaceModel) -> FilterResult:
        model = _discretized(model)
        arrays = linear_arrays(model, np.arange(model.num_times))
        result, kernel = self._run(model, arrays)
        return FilterResult(
            times=model.times,
            log_likelihood=result.log_likelihood,
            increments=result.increments,
            mean=result.mean,
            cov=result.cov,
            predicted_mean=result.predicted_mean,
            predicted_cov=result.predicted_cov,
            cross=result.cov[:-1] @ jnp.swapaxes(arrays.model.F, -1, -2),
            kernel=backward_kernels(arrays.model, result) if kernel is None else kernel,
        )

    def _run(
        self, model: StateSpaceModel, arrays: _Arrays
    ) -> tuple[kalman.Filtered, BackwardKernel | None]:
        data = arrays.y, arrays.present
        if model.init_kind == "flat":
            return diffuse.kalman_filter(arrays.model, *data, form=self.form)
        return kalman.kalman_filter(arrays.model, *data, form=self.form), None


def _discretized(model: StateSpaceModel) -> StateSpaceModel:
    """The model as it is filtered: with a scheme whose transition is normal, or continuous.

    `scheme_chosen` tells which; the continuous one has constant coefficients and is driven by
    Brownian motion.
    """
    matched = isinstance(model.scheme, MatchedJumps)
    if not (model.sde.is_diffusion or matched):
        _refuse(
            f"a {type(model.sde).__name__} with scheme {type(model.scheme).__name__} jumps, or "
            "follows a hidden regime",
            model.scheme.taken_by,
        )
    if model.scheme_chosen:
        shape = model.state_shape
        if shape is None:
            shape = () if model.scalar else (model.dim,)
        form = model.scheme.gaussian_form(model.sde, shape)
        if form is None:
            name = type(model.scheme).__name__
            _refuse(
                f"the path was given scheme={name}(), whose transition is not normal for this "
                "SDE. Leave the scheme out to have a linear SDE discretised exactly, or choose "
                "LocalLinear()",
                model.scheme.taken_by,
            )
        return model._replace(scheme=form.linearizable())
    if is_forced(model):
        reason = why_not_linear(model)
        if reason:
            _refuse(reason)
        if not varies_inside(model):
            return model
        return model.with_scheme(TimeVaryingLinear())._replace(scheme_chosen=True)
    carried = model if model.markovian is None else model.markovian
    noise = carried.sde.noise
    if not noise.independent:
        _refuse(
            f"noise {type(noise).__name__} with a Hurst index that changes in time has no linear "
            "SDE; give SDEPath scheme=Euler() to take its increments on the path's grid"
        )
    if not _check_coefficients(carried):
        return carried
    if carried is not model:
        _refuse(
            f"drift or diffusion depends on t with noise {type(model.sde.noise).__name__}; give "
            "SDEPath scheme=Euler() to take its increments on the path's grid"
        )
    return model._replace(scheme=TimeVaryingLinear(), scheme_chosen=True, cache=None)


def _refuse(reason: str, taken_by: str = "") -> NoReturn:
    if taken_by:
        raise ValueError(
            f"Kalman is exact for linear-Gaussian models only: {reason}. Use {taken_by}"
        )
    raise ValueError(
        f"Kalman is exact for linear-Gaussian models only: {reason}. Approximations, each with an "
        "error of its own: MomentMatching() integrates the moments over each step; "
        "ExtendedKalman() and UnscentedKalman() go by the path's scheme, which is Euler() unless "
        "one was chosen, and its error grows with the steps of the grid and stands in the "
        "likelihood: give SDEPath scheme=LocalLinear() or a fine TimeGrid. Or leave the path "
        "latent"
    )


def _check_coefficients(model: StateSpaceModel) -> bool:
    """Refuse coefficients that are not linear; return whether they change with time."""
    x = jax.ShapeDtypeStruct((model.dim,), jnp.result_type(float))
    t = jax.ShapeDtypeStruct((), jnp.result_type(float))
    zero = jnp.zeros(())
    (drift,) = degrees(lambda x: model.drift(zero, x), x)
    (noise,) = degrees(lambda x: model.factor(zero, x), x)
    if drift > 1:
        _refuse("drift(t, x) is not affine in x")
    if noise > 0:
        _refuse("diffusion(t, x) depends on x")
    state = jnp.ones(x.shape, x.dtype)
    both = degrees(lambda t: (model.drift(t, state), model.factor(t, state)), t)
    return max(both) > 0


def _check_scheme(model: StateSpaceModel, x: Any) -> None:
    if model.num_times < 2:
        return
    t, dt, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
    mean, cov = degrees(lambda x: model.step_moments(t, dt, x, cache), x)
    if mean > 1 or cov > 0:
        what = "mean is not affine in x" if mean > 1 else "covariance depends on x"
        _refuse(f"the transition of {type(model.scheme).__name__}: its {what}")


def _check_emission(instrument: Instrument, number: int, x: Any) -> None:
    name = f"emission of observe statement {number + 1}"
    if not instrument.gaussian:
        _refuse(f"the {name} is not normal")
    inputs = jax.tree.map(lambda a: a[0], instrument.inputs)
    mean, cov = degrees(lambda x: instrument.moments(inputs, x), x)
    if mean > 1:
        _refuse(f"the mean of the {name} is not affine in x")
    if cov > 0:
        _refuse(f"the covariance of the {name} depends on x")


def _observed_rows(model: StateSpaceModel) -> np.ndarray:
    """Grid indices that matter: the start, and wherever something is observed."""
    if model.scheme_chosen:
        return np.arange(model.num_times)
    rows = [[0], *(i.rows for i in model.instruments)]
    if is_forced(model):
        rows.append(forced_rows(model))
    return np.unique(np.concatenate(rows)).astype(int)


def linear_arrays(model: StateSpaceModel, rows: np.ndarray, *, shared: bool = False) -> _Arrays:
    """The arrays of a linear-Gaussian model at some grid indices, with its data.

    With `shared`, one transition for all steps where these are known to be equal.
    """
    dtype = jnp.result_type(float)
    F, c, Q, Q_factor = _transitions(model, rows, shared)
    parts = [_emission(instrument, model.dim, rows) for instrument in model.instruments]
    C = jnp.concatenate(_aligned([p[0] for p in parts], 2), axis=-2)
    e = jnp.concatenate(_aligned([p[1] for p in parts], 1), axis=-1)
    correlated = not all(i.diagonal for i in model.instruments)
    if correlated:
        R = _block_diagonal(_aligned([p[2] for p in parts], 2))
    else:
        variances = [diagonal(p[2]) for p in parts]
        R = jnp.concatenate(_aligned(variances, 1), axis=-1)
    linear = kalman.LinearGaussian(
        m0=model.init_mean.astype(dtype),
        P0=model.init_cov.astype(dtype),
        F=F,
        c=c,
        Q=Q,
        C=C,
        R=R,
        e=e,
        Q_factor=Q_factor,
        correlated=correlated,
        # The processes that carry a noise's memory, behind the state, read themselves alone.
        coupled=model.visible_size,
    )
    y = jnp.concatenate([i.values for i in model.instruments], axis=-1)
    on_host = all(isinstance(i.present, np.ndarray) for i in model.instruments)
    xp: Any = np if on_host else jnp
    present = xp.concatenate([i.present for i in model.instruments], axis=-1)
    if len(rows) != model.num_times:
        y, present = y[rows], present[rows]
    nothing_missing = on_host and bool(present.all())
    return _Arrays(linear, y.astype(dtype), None if nothing_missing else present, rows)


def _transitions(
    model: StateSpaceModel, rows: np.ndarray, shared: bool
) -> tuple[Array, Array, Array, Array | None]:
    origin = jnp.zeros(model.dim, jnp.result_type(float))
    if model.scheme_chosen:

        def one(now: Any) -> tuple[Array, Array, Array, Array]:
            t, dt, cache = now
            F = jax.jacfwd(lambda x: model.step_law(t, dt, x, cache)[0])(origin)
            c, factor = model.step_law(t, dt, origin, cache)
            return F, c, factor @ factor.T, factor

        return jax.vmap(one)(model.step_inputs())
    if is_forced(model):
        return *forced_transitions(model, rows), None
    zero = jnp.zeros(())
    A = jax.jacfwd(lambda x: model.drift(zero, x))(origin)
    b, L = model.drift(zero, origin), model.factor(zero, origin)
    if len(rows) == model.num_times:
        dt = model.dt
    elif isinstance(model.times, np.ndarray):
        dt = np.diff(model.times[rows])
    else:  # sums of the steps: differences of traced times would have lost digits
        own = np.searchsorted(rows, np.arange(model.num_times - 1), side="right") - 1
        dt = jax.ops.segment_sum(jnp.asarray(model.dt), own, len(rows))[: len(rows) - 1]
    if shared and len(rows) > 2 and isinstance(dt, np.ndarray):
        lengths, _ = discretize.distinct_steps(dt)
        dt = lengths if len(lengths) == 1 else dt
    if model.dim == 1:  # the closed form of a scalar process
        F, c, Q = discretize.transitions(A[0, 0], b[0], L[0], dt)
        return F[:, None, None], c[:, None], Q[:, None, None], None
    return *discretize.transitions(A, b, L, dt), None


def _emission(instrument: Instrument, dim: int, rows: np.ndarray) -> tuple[Array, Array, Array]:
    """Matrix, offset and covariance of the emission, with a time axis if they vary."""
    origin = jnp.zeros(dim, jnp.result_type(float))

    def at(inputs: Any) -> tuple[Array, Array, Array]:
        C = jax.jacfwd(lambda x: instrument.moments(inputs, x)[0])(origin)
        e, R = instrument.moments(inputs, origin)
        return C, e, R

    first = jax.tree.map(lambda a: a[0], instrument.inputs)
    shapes = jax.eval_shape(lambda i: i, first)
    leaves, treedef = jax.tree_util.tree_flatten(shapes)
    constant = True
    for k, leaf in enumerate(leaves):
        values = list(jax.tree_util.tree_leaves(first))

        def vary(one: Any, k: int = k, values: list[Any] = values) -> Any:
            varied = [*values[:k], one, *values[k + 1 :]]
            return at(jax.tree_util.tree_unflatten(treedef, varied))

        constant = constant and max(degrees(vary, leaf)) == 0
    if constant:
        return at(first)
    taken = jax.tree.map(lambda a: take_rows(jnp.asarray(a), rows), instrument.inputs)
    return jax.vmap(at)(taken)


def _aligned(arrays: list[Array], event_dim: int) -> list[Array]:
    """Give all arrays a time axis if one has it."""
    if all(a.ndim == event_dim for a in arrays):
        return arrays
    length = next(a.shape[0] for a in arrays if a.ndim > event_dim)
    return [a if a.ndim > event_dim else jnp.broadcast_to(a, (length, *a.shape)) for a in arrays]


def _block_diagonal(blocks: list[Array]) -> Array:
    total = sum(b.shape[-1] for b in blocks)
    out = jnp.zeros((*blocks[0].shape[:-2], total, total), blocks[0].dtype)
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        out = out.at[..., start:stop, start:stop].set(block)
        start = stop
    return out
