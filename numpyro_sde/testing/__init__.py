"""Contract checks for users' own path laws (and any other NumPyro distribution) and engines.

A law that is to be used in models has to keep more than `sample` and `log_prob`: shapes,
`expand`, `mask`, `to_event`, the pytree round trip, `jit`, `vmap`, gradients, `Predictive`,
`log_likelihood`, effect handlers. NumPyro's own test suite states that contract for its
distributions; these functions state it for others. Every check raises an `AssertionError` that
says what failed and on which numbers. `check_filter` and `check_path_law` hold a filter, or the
path law of a guide, against exact densities on every way in which a model may observe a path.
"""

from numpyro_sde.testing.construction import (
    check_construction_in_jit,
    check_parameter_gradient,
    check_sample_gradient,
    check_value_gradient,
    check_vmap,
)
from numpyro_sde.testing.contract import (
    check_distribution,
    check_expand,
    check_model,
    check_pytree,
    check_rsample,
    check_shapes,
    check_wrappers,
)
from numpyro_sde.testing.density import check_samples_match_density
from numpyro_sde.testing.engines import check_filter, check_path_law

__all__ = [
    "check_construction_in_jit",
    "check_distribution",
    "check_expand",
    "check_filter",
    "check_model",
    "check_parameter_gradient",
    "check_path_law",
    "check_pytree",
    "check_rsample",
    "check_sample_gradient",
    "check_samples_match_density",
    "check_shapes",
    "check_value_gradient",
    "check_vmap",
    "check_wrappers",
]
