"""What NumPyro asks of a distribution object, check by check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import PRNGKeyArray
from numpyro import handlers
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.initialization import init_to_sample
from numpyro.infer.util import initialize_model

from numpyro_sde.testing.compare import assert_close, assert_shape, assert_true, draw_and_judge
from numpyro_sde.testing.construction import (
    check_construction_in_jit,
    check_parameter_gradient,
    check_sample_gradient,
    check_value_gradient,
    check_vmap,
)
from numpyro_sde.testing.density import check_samples_match_density

_SAMPLE_SHAPES = ((), (2,), (2, 3))


def check_distribution(
    law: dist.Distribution | Callable[..., dist.Distribution],
    key: PRNGKeyArray,
    *,
    args: Sequence[Any] = (),
    fields: Mapping[str, int] | None = None,
    num_samples: int = 0,
) -> None:
    """Run every check of this module that applies to a law.

    Args:
        law: a distribution, or a function that makes one from arrays. Only for a function can
            construction under `jit`, `vmap` and `grad` be checked: prefer it.
        key: random key.
        args: the arrays (or pytrees of arrays) to call `law` with.
        fields: for `vmap_over`, which of `args` (by position) each of the law's fields is made
            from.
        num_samples: if positive, also `check_samples_match_density` with so many draws. Feasible
            for laws of few free components (at most 10 or so).

    Raises:
        AssertionError: naming the first check that failed, with the numbers.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.testing import check_distribution
        >>> def law(rate, scale):
        ...     sde = nsde.SDE(
        ...         lambda t, x, p: -p["rate"] * x, lambda t, x, p: p["scale"],
        ...         params={"rate": rate, "scale": scale})
        ...     return nsde.SDEPath(sde, [0.0, 0.1, 0.3], init=dist.Normal(0.0, 1.0))
        >>> check_distribution(law, jax.random.key(0), args=(jnp.array(1.0), jnp.array(0.5)))
    """
    make: Callable[..., dist.Distribution]
    if isinstance(law, dist.Distribution):
        if args:
            raise ValueError("args are for a function that makes the law; got a distribution")
        made, make = law, lambda: law
    else:
        made, make = law(*args), law
    check_shapes(made, key)
    check_expand(made, key)
    check_wrappers(made, key)
    check_pytree(made, key)
    check_rsample(made, key)
    check_model(made, key)
    if not made.is_discrete:
        check_value_gradient(make, key, args=args)
    if args:
        check_construction_in_jit(make, key, args=args)
        check_vmap(make, key, args=args, fields=fields)
        check_parameter_gradient(make, key, args=args)
        check_sample_gradient(make, key, args=args)
    if num_samples:
        check_samples_match_density(made, key, num_samples=num_samples)


def check_shapes(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check shapes of draws and densities, alone and under `jit`, and that draws are supported.

    Raises:
        AssertionError: naming the shapes.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_shapes
        >>> check_shapes(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """
    for shape in _SAMPLE_SHAPES:
        value = jax.eval_shape(partial(law.sample, sample_shape=shape), key)
        assert_shape(f"sample(key, {shape})", value, shape + law.batch_shape + law.event_shape)
        density = jax.eval_shape(law.log_prob, value)
        assert_shape(f"log_prob of sample_shape {shape}", density, shape + law.batch_shape)
    value, density, _ = draw_and_judge(law, law, key, shape)
    assert_true(bool(jnp.all(jnp.isfinite(density))), "log_prob of a draw is not finite", density)
    eager = law.sample(key, shape)
    assert_close("sample without jit", eager, value)
    assert_true(eager.dtype == value.dtype, "sample under jit changes dtype", value.dtype)
    assert_close("log_prob without jit", law.log_prob(value), density)
    inside: Any = law.support(value)
    assert_shape("support(sample)", inside, shape + law.batch_shape)
    assert_true(bool(jnp.all(inside)), "a draw lies outside the support", value)
    value, intermediates = law.sample_with_intermediates(key)
    if intermediates:
        assert_close("intermediates", law.log_prob(value, intermediates), law.log_prob(value))
    repr(law)


def check_expand(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check `expand`, `expand` of an expanded law, `expand_by`, and the refusal to shrink.

    Raises:
        AssertionError: naming the shapes.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_expand
        >>> check_expand(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """
    for lead in _SAMPLE_SHAPES:
        batch = lead + law.batch_shape
        for how, wide, shape in (
            (f"expand({batch})", law.expand(batch), batch),
            (f"expand_by({lead})", law.expand_by(list(lead)), batch),
            (f"expand({batch}) twice", law.expand(batch).expand((4, *batch)), (4, *batch)),
        ):
            assert_true(wide.batch_shape == shape, f"{how}: batch shape must be {shape}", wide)
            value = jax.eval_shape(partial(wide.sample, sample_shape=(3,)), key)
            assert_shape(f"{how}.sample", value, (3, *shape, *law.event_shape))
            density = jax.eval_shape(wide.log_prob, value)
            assert_shape(f"{how}.log_prob", density, (3, *shape))
        if lead:
            try:
                law.expand(batch).expand((3, *law.batch_shape))
            except ValueError:
                continue
            raise AssertionError(f"expand({batch}) then shrinks without an error")
    wide = law.expand((2, *law.batch_shape))
    _, density, own = draw_and_judge(wide, law, key, (3,))
    assert_close("log_prob of an expanded law against the law's own", density, own)


def check_wrappers(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check `mask` and `to_event` against the law's own density.

    Raises:
        AssertionError: naming the wrapper and the numbers.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_wrappers
        >>> check_wrappers(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """
    flags = jax.random.bernoulli(key, 0.5, (3, *law.batch_shape)).at[0].set(True)
    masks: tuple[Any, ...] = (True, False, flags)
    events = range(1, len(law.batch_shape) + 1)

    @jax.jit
    def run(key: Any) -> Any:
        value = law.sample(key, (3,))
        masked = [law.mask(mask).log_prob(value) for mask in masks]
        return value, law.log_prob(value), masked, [law.to_event(n).log_prob(value) for n in events]

    value, density, masked, joint = run(key)
    for mask, got in zip(masks, masked, strict=True):
        assert_close("mask: log_prob", got, jnp.where(mask, density, 0.0))
    for dims, got in zip(events, joint, strict=True):
        total = jnp.sum(density, axis=tuple(range(-dims, 0)))
        assert_close(f"to_event({dims}): log_prob", got, total, scale=density.size)
        made = law.to_event(dims)
        cut = len(law.batch_shape) - dims
        assert_true(made.batch_shape == law.batch_shape[:cut], "to_event: batch", made.batch_shape)
        drawn = jax.eval_shape(partial(made.sample, sample_shape=(3,)), key)
        assert_shape(f"to_event({dims}): sample", drawn, value.shape)
    wide = law.expand_by([2]).to_event(1)
    assert_true(
        wide.has_rsample == law.has_rsample, "to_event changes has_rsample", wide.has_rsample
    )
    assert_true(law.mask(False).has_rsample == law.has_rsample, "mask changes has_rsample", None)


def check_pytree(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check the pytree round trip: flattening, through `jit` both ways, `lax.map`, no retrace.

    Raises:
        AssertionError: naming the passage that changes the law.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_pytree
        >>> check_pytree(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """
    value = law.sample(key)
    density = law.log_prob(value)
    leaves, treedef = jax.tree_util.tree_flatten(law)
    for leaf in leaves:
        assert_true(
            isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float),
            "a pytree leaf is no array (code belongs in the auxiliary data)",
            type(leaf),
        )
    again = jax.tree_util.tree_unflatten(treedef, leaves)
    for how, copy in (
        ("flatten and unflatten", again),
        ("an output of jit", jax.jit(lambda: law)()),
        ("in and out of jit", jax.jit(lambda d: d)(law)),
        ("expand in and out of jit", jax.jit(lambda d: d)(law.expand(law.batch_shape))),
    ):
        assert_true(copy.batch_shape == law.batch_shape, f"{how}: batch shape", copy.batch_shape)
        assert_true(copy.event_shape == law.event_shape, f"{how}: event shape", copy.event_shape)
        assert_close(f"{how}: sample", copy.sample(key), value)
        assert_close(f"{how}: log_prob", copy.log_prob(value), density)
    traces = []

    @jax.jit
    def count(d: dist.Distribution) -> Any:
        traces.append(1)
        return d.log_prob(value)

    count(law)
    assert_close("as an argument of jit: log_prob", count(again), density)
    assert_true(
        len(traces) == 1, "as an argument of jit the law retraces: unequal auxiliary data", None
    )
    stacked = jax.lax.map(lambda _: law, jnp.arange(3.0))
    first = jax.tree.map(lambda a: a[0], stacked)
    assert_close("lax.map: log_prob", first.log_prob(value), density)


def check_rsample(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check that `has_rsample`, `rsample` and `reparametrized_params` tell the same.

    Raises:
        AssertionError: where they differ.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_rsample
        >>> check_rsample(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """
    if law.has_rsample:
        assert_true(not law.is_discrete, "a discrete law has has_rsample", law)
        declared, params = set(law.arg_constraints), set(law.reparametrized_params)
        inner = isinstance(law, dist.ExpandedDistribution | dist.Independent)
        assert_true(
            declared == params or inner,
            "has_rsample, but arg_constraints and reparametrized_params differ",
            (declared, params),
        )
        assert_close("rsample", law.rsample(key), law.sample(key))
        return
    try:
        law.rsample(key)
    except NotImplementedError:
        return
    raise AssertionError("rsample works although has_rsample is False")


def check_model(law: dist.Distribution, key: PRNGKeyArray) -> None:
    """Check the law as a site of a model: inference utilities and effect handlers.

    Raises:
        AssertionError: naming the utility or handler.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_model
        >>> check_model(dist.Normal(0.0, 1.0).expand([3]), jax.random.key(0))
    """

    def model(x: Any = None) -> Any:
        numpyro.sample("other", dist.Normal(0.0, 1.0))
        return numpyro.sample("x", law, obs=x)

    shape = law.batch_shape + law.event_shape
    value = jax.jit(law.sample)(key)
    density = jax.jit(law.log_prob)(value)
    draws = {"other": jnp.zeros(4)}

    @jax.jit
    def run(key: Any) -> Any:
        prior = Predictive(model, num_samples=4)(key)["x"]
        assert_shape("Predictive (prior)", prior, (4, *shape))
        each = {}
        for parallel in (False, True):
            posterior = Predictive(model, draws, parallel=parallel)(key)["x"]
            assert_shape(f"Predictive (parallel={parallel})", posterior, (4, *shape))
            each[parallel] = log_likelihood(model, draws, parallel=parallel, x=value)["x"]
        return each

    for parallel, each in run(key).items():
        expected = jnp.broadcast_to(density, (4, *law.batch_shape))
        assert_close(f"log_likelihood (parallel={parallel})", each, expected)
    _check_handlers(model, value, density, key)
    if not law.is_discrete:
        info = initialize_model(key, model, init_strategy=init_to_sample)
        gradient = jax.jit(jax.grad(info.potential_fn))(info.param_info.z)
        finite = all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(gradient))
        assert_true(finite, "the potential's gradient at a prior draw is not finite", gradient)
        back = jax.eval_shape(info.postprocess_fn, info.param_info.z)["x"]
        assert_shape("a site mapped to its support", back, shape)


def _check_handlers(model: Callable[..., Any], value: Any, density: Any, key: Any) -> None:
    def site(fn: Callable[..., Any], name: str = "x") -> Any:
        return handlers.trace(fn).get_trace()[name]

    data = {"x": value}
    seeded = handlers.seed(model, key)
    inside = handlers.seed(handlers.condition(model, data), key)
    scoped = handlers.scope(handlers.condition(seeded, data), "a")
    held = {
        "condition": (handlers.condition(seeded, data), "x"),
        "condition inside seed": (inside, "x"),
        "substitute": (handlers.substitute(seeded, data), "x"),
        "scope": (scoped, "a/x"),
        "mask": (handlers.mask(handlers.condition(seeded, data), mask=False), "x"),
    }

    @jax.jit
    def run() -> Any:
        out = {}
        for how, (fn, name) in held.items():
            found = site(fn, name)
            observed = how != "substitute"
            assert_true(found["is_observed"] == observed, f"{how}: is_observed", not observed)
            out[how] = found["value"], found["fn"].log_prob(found["value"])
        out["do"] = handlers.do(seeded, data)(), density
        return out

    for how, (found, log_density) in run().items():
        assert_close(f"{how}: value", found, value)
        expected = jnp.zeros_like(density) if how == "mask" else density
        assert_close(f"{how}: log_prob", log_density, expected)
    hidden = handlers.trace(handlers.block(inside, hide=["x"])).get_trace()
    assert_true("x" not in hidden, "block does not hide the site", list(hidden))
    free = jax.eval_shape(lambda: site(handlers.uncondition(inside))["value"])
    assert_shape("uncondition: value", free, jnp.shape(value))
