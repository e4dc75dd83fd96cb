"""Unbalanced transport by ott-jax, for masses that no known growth explains.

Cuturi, Meng-Papaxanthos, Tian and others (2022), "Optimal transport tools (OTT): a JAX toolbox",
arXiv:2201.12324.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FAR = 1e8  # cost of a pair of which one cell is not there


def solve_unbalanced(
    log_kernel: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    *,
    tau: float,
    tol: float,
    max_iterations: int,
) -> tuple[Array, Array, Array, Array]:
    """Potentials of a coupling whose marginals hold in part.

    Args:
        log_kernel: log densities.
        a: weights of the rows.
        b: weights of the columns.
        tau: how strictly both marginals hold, `lambda / (1 + lambda)` for a penalty of `lambda`
            times the relative entropy; 1 exactly.
        tol: threshold of its error.
        max_iterations: bound on the iterations.

    Returns:
        Potentials of rows and columns, the sum of the absolute errors of the first marginal, and
        the number of iterations.

    Raises:
        ImportError: ott-jax is not installed.

    Example:
        >>> from numpyro_sde.interop.ott import solve_unbalanced
        >>> solve_unbalanced.__name__
        'solve_unbalanced'
    """
    try:
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    except ImportError as error:
        raise ImportError("unbalanced bridges (tau=) need ott-jax: pip install ott-jax") from error
    there = (a[:, None] > 0) & (b[None] > 0)
    both = jnp.where(there, a[:, None] * b[None], 1.0)
    # The measure that masses are compared with is the reference's coupling, a probability: so that
    # they depend neither on the unit of the state nor on the number of cells.
    raw = jnp.where(there, log_kernel + jnp.log(both), -_FAR)
    total = jax.nn.logsumexp(raw)
    cost = jnp.where(there, total - raw, _FAR)
    problem = LinearProblem(Geometry(cost_matrix=cost, epsilon=1.0), a=a, b=b, tau_a=tau, tau_b=tau)
    solver = Sinkhorn(threshold=tol, max_iterations=max_iterations, lse_mode=True)
    out = solver(problem)
    f = jnp.where(a > 0, out.f - total, 0.0)
    g = jnp.where(b > 0, out.g, 0.0)
    coupling = a[:, None] * b[None] * jnp.exp(log_kernel + f[:, None] + g[None])
    miss = jnp.sum(jnp.abs(coupling.sum(1) - a))
    return f, g, miss, jnp.asarray(out.n_iters, jnp.int32)
