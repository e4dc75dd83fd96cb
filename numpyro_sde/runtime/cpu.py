"""XLA's options for loops over small arrays on a CPU."""

from __future__ import annotations

import os
import re
import warnings

import jax
import jaxlib

# On a CPU XLA dispatches each operation of a loop at each step, unless what a step touches is
# smaller than this many bytes: then the loop is one kernel. XLA's default, 1,024, is just below
# what a step of a filter or of a guided path in two dimensions touches. Far larger values only
# make compiling slower. From jaxlib 0.12.0 on XLA by itself makes one kernel of every loop tried
# (matrices of up to 2,000 rows), and the option would take that from the larger ones.
_LOOP_OPTION, _LOOP_BYTES = "xla_cpu_small_while_loop_byte_threshold", 65536
_LOOP_NEEDED_BEFORE = (0, 12, 0)
_EXTRA = "--xla_backend_extra_options="

# The emitters of fusions through MLIR double the time of compiling and gain nothing on small
# arrays. XLA ends the process at a flag that it does not know, and this one is gone after 0.11.0.
_EMITTERS = "--xla_cpu_use_fusion_emitters"
_EMITTERS_KNOWN = ((0, 7, 0), (0, 11, 0))

# From jaxlib 0.10.2 on XLA hands sums of products to YNNPACK, which gets some of them wrong without
# a word: `F - (F * k[:, None]).sum(-1)[..., None]` for F of shape (1, 10, 10) and k of (1000, 10),
# and sums over more than 16,384 rows (https://github.com/jax-ml/jax/issues/39103). Here that is
# every filter's matrices and every large set of particles.
_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
_FUSIONS_WRONG = ((0, 10, 2), (0, 11, 0))


def configure_cpu() -> str:
    """Make XLA compile small loops faster and run them as one kernel, on a CPU.

    Filters, guided paths and simulators are loops over small vectors. Before jaxlib 0.12 XLA
    dispatches every operation of such a loop at every step; two of its flags make one kernel of the
    loop instead and halve the time of compiling. With jaxlib 0.10.2 a gradient along a guided path
    of 400 steps takes 0.23 ms for 1.66, compiling it 1.0 s for 2.5. Results change by rounding at
    most. From jaxlib 0.12 on XLA makes one kernel of a loop by itself, and nothing is set.

    Call it once, before the first computation with JAX (importing is no computation): XLA reads
    its flags then and never again. Flags that `XLA_FLAGS` already sets stay as they are; those that
    the installed jaxlib does not know are left out, and so is the one that needs XLA's
    optimisations where they are switched off (`JAX_DISABLE_MOST_OPTIMIZATIONS`). Where JAX is told
    to run elsewhere (`JAX_PLATFORMS`) nothing is done. Programs that spend their time in large
    arrays (many thousands of particles, neural networks) neither gain nor lose.

    Returns:
        The value of `XLA_FLAGS` from now on.

    Raises:
        RuntimeError: JAX has already computed something, so that the flags would not count.

    Example:
        >>> import numpyro_sde as nsde
        >>> flags = nsde.configure_cpu()  # first line after the imports
    """
    flags = os.environ.get("XLA_FLAGS", "")
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms and "cpu" not in platforms.split(","):
        return flags
    wanted = _with_flags(flags, _version())
    if wanted == flags:
        return flags
    if _has_computed():
        raise RuntimeError(
            "configure_cpu: JAX has already computed something in this process, and XLA reads its "
            "flags at the first computation only; call nsde.configure_cpu() right after the "
            f"imports, or start the process with XLA_FLAGS='{wanted}'"
        )
    os.environ["XLA_FLAGS"] = wanted
    return wanted


def avoid_wrong_sums() -> None:
    """Switch off fusions of XLA that give wrong numbers on a CPU; called at the import.

    Only with the versions of jaxlib that are known for it, and where `XLA_FLAGS` says nothing of
    them. Warns where JAX has already computed something: XLA does not read its flags again.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    platforms = getattr(jax.config, "jax_platforms", None)
    without = _without_wrong_fusions(flags, _version())
    if without == flags or (platforms and "cpu" not in platforms.split(",")):
        return
    if _has_computed():
        warnings.warn(
            f"jaxlib {jaxlib.__version__} computes some sums wrong on a CPU "
            "(https://github.com/jax-ml/jax/issues/39103). numpyro_sde switches the cause off when "
            "it is imported, but JAX had already computed something: import numpyro_sde before, or "
            f"start the process with XLA_FLAGS='{without}'",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = without


def _without_wrong_fusions(flags: str, version: tuple[int, ...]) -> str:
    oldest, newest = _FUSIONS_WRONG
    if _FUSIONS in flags or not oldest <= version <= newest:
        return flags
    return f"{flags} {_FUSIONS}=".strip()


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", jaxlib.__version__)[:3])


def _with_flags(flags: str, version: tuple[int, ...]) -> str:
    """Flags with ours added where they say nothing of the matter and this jaxlib knows ours."""
    parts = flags.split()
    option = f"{_LOOP_OPTION}={_LOOP_BYTES}"
    extra = [i for i, part in enumerate(parts) if part.startswith(_EXTRA)]
    if _LOOP_OPTION not in flags and version < _LOOP_NEEDED_BEFORE:
        if extra:  # XLA keeps the last of several such flags
            parts[extra[-1]] += f",{option}"
        else:
            parts.append(_EXTRA + option)
    oldest, newest = _EMITTERS_KNOWN
    if _EMITTERS not in flags and oldest <= version <= newest and _optimises(flags):
        parts.append(f"{_EMITTERS}=false")
    return _without_wrong_fusions(" ".join(parts), version)


def _optimises(flags: str) -> bool:
    """Whether XLA optimises: without, the older emitters give wrong numbers in some loops.

    Seen with jaxlib 0.10.2 at level 0: a covariance that depends on its parameter through a loop
    is off by as much as itself, at level 1 and above it is right to rounding.
    """
    without = bool(getattr(jax.config, "jax_disable_most_optimizations", False))
    return not without and "--xla_backend_optimization_level=0" not in flags


def _has_computed() -> bool:
    # JAX has no public name for this; without the private one the flags are set in good faith.
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:
        return False
    return backends_are_initialized()
