"""Timing of compiled functions: CPU time, medians, compile time apart."""

import statistics
import time

import jax


def compiled(fn, *args):
    """Compile `fn` for these arguments; return it and the seconds of tracing and compiling."""
    start = time.perf_counter()
    executable = jax.jit(fn).lower(*args).compile()
    return executable, time.perf_counter() - start


def cpu_ms(executable, *args, repeats=50):
    """Median CPU time of one call in milliseconds, after a warm-up."""
    jax.block_until_ready(executable(*args))
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(executable(*args))
        taken.append(time.process_time() - start)
    return 1e3 * statistics.median(taken)


def report(title, rows):
    """Print `rows` of (name, milliseconds, compile seconds) with ratios to the first."""
    print(f"\n{title}")
    print(f"  {'':<44}{'CPU ms':>10}{'ratio':>8}{'compile s':>11}")
    base = rows[0][1]
    for name, ms, seconds in rows:
        print(f"  {name:<44}{ms:>10.3f}{ms / base:>8.2f}{seconds:>11.2f}")
