"""Sinkhorn for 5 snapshots of 1,000 cells in 2 dimensions, beside its kernel and beside ott-jax.

Run `python benchmarks/bench_snapshots.py`; ott-jax is measured where it is installed. All times are
CPU seconds after compilation, the least of five.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import numpyro_sde as nsde
from numpyro_sde.snapshots import sinkhorn

nsde.configure_cpu()

NUM_CELLS, TIMES, TOL = 1000, [0.0, 1.0, 2.0, 3.0, 4.0], 1e-6


def clouds() -> np.ndarray:
    """Cells of a rotating Ornstein-Uhlenbeck process from a start off its rest point."""
    sde = reference()
    rng = np.random.default_rng(0)
    start = rng.normal(size=(NUM_CELLS, 2)) * 0.5 + np.array([2.0, 0.0])
    law = nsde.SnapshotLaw(sde, TIMES, start)
    return np.asarray(law.sample(jax.random.key(1)))


def reference() -> nsde.SDE:
    """The reference of all runs."""
    A = np.array([[-0.5, -1.5], [1.5, -0.5]])
    return nsde.processes.LinearSDE(A, np.zeros(2), 0.7 * np.eye(2))


def least_time(fn, *args) -> float:
    """CPU seconds, the least of five runs after one that compiles."""
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(5):
        before = time.process_time()
        jax.block_until_ready(fn(*args))
        found.append(time.process_time() - before)
    return min(found)


def main() -> None:
    cells = clouds()
    bridge = nsde.schrodinger_bridge(reference(), TIMES, cells, tol=TOL)
    law, weights = bridge.reference, bridge.cells.weights[0]
    values, times = bridge.cells.values, jnp.asarray(TIMES, bridge.f.dtype)
    grids = jnp.stack([times[:-1], times[1:]], axis=1)

    @jax.jit
    def kernels(values):
        gaps = (grids, values[:-1], values[1:])
        return jax.lax.map(lambda gap: law.log_kernel(*gap)[0], gaps)

    solve_one = partial(sinkhorn.solve, a=weights, b=weights, tol=TOL, max_iterations=100_000)

    @jax.jit
    def ours(values):
        return jax.lax.map(
            lambda gap: solve_one(law.log_kernel(*gap)[0]), (grids, values[:-1], values[1:])
        )

    held = kernels(values)
    solved = jax.jit(lambda held: jax.lax.map(solve_one, held))
    found = ours(values)
    counts = np.asarray(found.iterations)
    kernel_time, our_time, solver_time = (
        least_time(kernels, values),
        least_time(ours, values),
        least_time(solved, held),
    )
    print(f"dtype {values.dtype}, iterations {counts.tolist()}, errors {found.error}")
    print(f"kernels and Sinkhorn: {1e3 * our_time:.1f} ms")
    # Two readings of "the cost of its kernel evaluations": once, or anew in each iteration, as a
    # solver does that does not keep them.
    anew = kernel_time * counts.mean()
    print(
        f"  beside the kernels evaluated once, {1e3 * kernel_time:.1f} ms: "
        f"{our_time / kernel_time:.1f} times\n"
        f"  beside the kernels evaluated in each of {counts.mean():.1f} iterations, "
        f"{1e3 * anew:.1f} ms: {our_time / anew:.2f} times"
    )
    print(f"Sinkhorn alone, kernels held: {1e3 * solver_time:.1f} ms")
    try:
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    except ImportError:
        print("ott-jax is not installed")
        return
    for lse in (True, False):
        solver = Sinkhorn(threshold=TOL, max_iterations=100_000, lse_mode=lse)

        @jax.jit
        def theirs(held, solver=solver):
            def one(kernel):
                geometry = Geometry(cost_matrix=-kernel, epsilon=1.0)
                out = solver(LinearProblem(geometry, a=weights, b=weights))
                return out.f, out.g, out.n_iters

            return jax.lax.map(one, held)

        f, _, count = theirs(held)
        seconds = least_time(theirs, held)
        mode = "logs" if lse else "scalings"
        print(
            f"ott-jax in {mode}, kernels held: {1e3 * seconds:.1f} ms, "
            f"iterations {np.asarray(count).tolist()}, finite {bool(jnp.all(jnp.isfinite(f)))}"
        )


if __name__ == "__main__":
    main()
