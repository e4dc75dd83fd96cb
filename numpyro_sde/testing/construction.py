"""A law as a function of its arguments: `jit`, `vmap` and `grad` over the constructor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import PRNGKeyArray
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

from numpyro_sde.testing.compare import (
    as_float64,
    assert_close,
    assert_derivative,
    assert_shape,
    assert_true,
)


def check_value_gradient(
    law: Callable[..., dist.Distribution], key: PRNGKeyArray, *, args: Sequence[Any] = ()
) -> None:
    """Check the gradient of `log_prob` in its value against differences, in float64.

    The value moves along its support's free coordinates.

    Raises:
        AssertionError: with both derivatives.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_value_gradient
        >>> check_value_gradient(dist.LogNormal, jax.random.key(0), args=(0.0, 1.0))
    """
    with jax.enable_x64(True):
        made = law(*as_float64(args))
        bijection = dist.biject_to(made.support)
        free = bijection.inv(jnp.asarray(made.sample(key), jnp.float64))

        def density(u: Any) -> Any:
            return jnp.sum(made.log_prob(bijection(u)))

        assert_derivative("log_prob in its value", density, (free,), key)


def check_parameter_gradient(
    law: Callable[..., dist.Distribution], key: PRNGKeyArray, *, args: Sequence[Any]
) -> None:
    """Check the gradient of `log_prob` in each argument against differences, in float64.

    Raises:
        AssertionError: with both derivatives.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_parameter_gradient
        >>> check_parameter_gradient(dist.Normal, jax.random.key(0), args=(0.0, 1.0))
    """
    with jax.enable_x64(True):
        wide = as_float64(args)
        value = law(*wide).sample(key)
        for i in range(len(wide)):

            def density(arg: Any, i: int = i) -> Any:
                return jnp.sum(law(*wide[:i], arg, *wide[i + 1 :]).log_prob(value))

            with numpyro.validation_enabled(False):
                assert_derivative(f"log_prob in argument {i}", density, (wide[i],), key)


def check_sample_gradient(
    law: Callable[..., dist.Distribution], key: PRNGKeyArray, *, args: Sequence[Any]
) -> None:
    """Check that draws differentiate in the arguments, as `has_rsample` promises.

    Raises:
        AssertionError: with both derivatives.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_sample_gradient
        >>> check_sample_gradient(dist.Normal, jax.random.key(0), args=(0.0, 1.0))
    """
    with jax.enable_x64(True):
        wide = as_float64(args)
        if not law(*wide).has_rsample:
            return
        for i in range(len(wide)):

            def draw(arg: Any, i: int = i) -> Any:
                made = law(*wide[:i], arg, *wide[i + 1 :])
                return jnp.sum(jnp.sin(made.rsample(key)))

            with numpyro.validation_enabled(False):
                assert_derivative(f"a draw in argument {i}", draw, (wide[i],), key)


def check_construction_in_jit(
    law: Callable[..., dist.Distribution], key: PRNGKeyArray, *, args: Sequence[Any]
) -> None:
    """Check that a law made inside `jit` from traced arrays is the same law, in and out.

    Raises:
        AssertionError: naming what differs.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_construction_in_jit
        >>> check_construction_in_jit(dist.Normal, jax.random.key(0), args=(0.0, 1.0))
    """
    made = law(*args)
    value = made.sample(key, (2, 3))
    density = made.log_prob(value)
    inside = jax.jit(lambda *a: law(*a).log_prob(value))(*args)
    assert_close("log_prob of a law made inside jit", inside, density)
    out = jax.jit(law)(*args)
    assert_close("log_prob of a law that jit returns", out.log_prob(value), density)
    assert_close("sample of a law that jit returns", out.sample(key, (2, 3)), value)
    sample = jax.jit(lambda *a: law(*a).sample(key))(*args)
    assert_close("sample of a law made inside jit", sample, made.sample(key))


def check_vmap(
    law: Callable[..., dist.Distribution],
    key: PRNGKeyArray,
    *,
    args: Sequence[Any],
    fields: Mapping[str, int] | None = None,
) -> None:
    """Check `vmap` over the constructor, `promote_batch_shape`, and `vmap_over`.

    Args:
        law: function that makes the law.
        key: random key.
        args: the arrays to call it with.
        fields: which argument (by position) each field known to `vmap_over` is made from.

    Raises:
        AssertionError: naming the axis and what differs.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_vmap
        >>> args = (jnp.array(0.0), jnp.array(1.0))
        >>> check_vmap(dist.Normal, jax.random.key(0), args=args, fields={"loc": 0})
    """
    args = jax.tree.map(jnp.asarray, tuple(args))
    made = law(*args)
    value = made.sample(key)
    density = made.log_prob(value)
    twice = tuple(jax.tree.map(lambda a: jnp.stack([a, a]), arg) for arg in args)
    cases: list[tuple[tuple[int | None, ...], Any, str]] = [((0,) * len(args), 0, "all arguments")]
    for i in range(len(args)):
        axes = tuple(0 if j == i else None for j in range(len(args)))
        cases.append((axes, 0, f"argument {i}"))
    for field, i in (fields or {}).items():
        axes = tuple(0 if j == i else None for j in range(len(args)))
        cases.append((axes, vmap_over(law(*args), **{field: 0}), f"field {field}"))
    for axes, out, what in cases:
        given = [t if axis == 0 else a for t, a, axis in zip(twice, args, axes, strict=True)]

        @jax.jit
        def run(given: Any, axes: Any = axes, out: Any = out) -> Any:
            many = jax.vmap(law, in_axes=axes, out_axes=out)(*given)
            each = jax.vmap(lambda d: d.log_prob(value), in_axes=(out,))(many)
            draws = jax.vmap(lambda d: d.sample(key), in_axes=(out,))(many)
            if out != 0:
                return each, draws, each
            wide = promote_batch_shape(many)
            shape = (2, *made.batch_shape)
            assert_true(wide.batch_shape == shape, "promote_batch_shape", wide.batch_shape)
            drawn = jax.eval_shape(wide.sample, key)
            assert_shape("sample of a promoted law", drawn, shape + made.event_shape)
            return each, draws, wide.log_prob(jnp.stack([value, value]))

        each, draws, promoted = run(given)
        densities = jnp.stack([density, density])
        assert_close(f"vmap over {what}: log_prob", each, densities)
        assert_close(f"vmap over {what}: sample", draws, jnp.stack([value, value]))
        assert_close(f"vmap over {what}, promote_batch_shape: log_prob", promoted, densities)
