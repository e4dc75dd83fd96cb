"""XLA's flags: set before the first computation, guarded by version, refused after."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import numpyro_sde as nsde
from numpyro_sde.runtime.cpu import _version, _with_flags

LOOP = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=65536"
UNOPTIMISED = "--xla_backend_optimization_level=0"
EMITTERS = "--xla_cpu_use_fusion_emitters=false"
WITHOUT_YNN = "--xla_cpu_experimental_ynn_fusion_type="


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = str(Path(nsde.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("given", "version", "wanted"),
    [
        ("", (0, 10, 1), f"{LOOP} {EMITTERS}"),
        ("", (0, 10, 2), f"{LOOP} {EMITTERS} {WITHOUT_YNN}"),
        ("", (0, 11, 0), f"{LOOP} {EMITTERS} {WITHOUT_YNN}"),
        (f"{WITHOUT_YNN}dot", (0, 10, 2), f"{WITHOUT_YNN}dot {LOOP} {EMITTERS}"),
        ("", (0, 11, 1), LOOP),  # the flag is gone: XLA would end the process
        ("--a=1", (0, 7, 2), f"--a=1 {LOOP} {EMITTERS}"),
        ("--xla_cpu_use_fusion_emitters=true", (0, 7, 2), f"{EMITTERS[:-5]}true {LOOP}"),
        ("--xla_backend_extra_options=b=2", (0, 11, 2), LOOP.replace("=xla", "=b=2,xla")),
        # XLA by itself takes larger loops than the option would.
        ("", (0, 12, 0), ""),
        ("--xla_backend_extra_options=b=2", (0, 12, 0), "--xla_backend_extra_options=b=2"),
        (f"{LOOP[:-5]}1024 {EMITTERS}", (0, 10, 1), f"{LOOP[:-5]}1024 {EMITTERS}"),
        # Without optimisations those emitters give wrong numbers.
        (UNOPTIMISED, (0, 10, 1), f"{UNOPTIMISED} {LOOP}"),
    ],
)
def test_flags_are_added_to_those_given(given, version, wanted):
    assert _with_flags(given, version) == wanted
    assert _with_flags(wanted, version) == wanted


# A scan whose steps touch more than XLA's default of 1,024 bytes: one kernel only with the flags.
SCAN = """
import jax, jax.numpy as jnp, numpyro_sde as nsde
{}
def step(c, _):
    for i in range(6):
        c = jnp.sin(jnp.roll(c, 1)) @ jnp.ones((8, 8))
    return c, c
text = jax.jit(lambda x: jax.lax.scan(step, x, None, 99)).lower(jnp.ones(8)).compile().as_text()
print("xla_cpu_small_call" in text)
{}
"""


def test_loops_become_one_kernel():
    plain, configured = run(SCAN.format("", "")), run(SCAN.format("nsde.configure_cpu()", ""))
    assert plain.stdout.split() == [str(_version() >= (0, 12, 0))], plain.stderr
    assert configured.stdout.split() == ["True"], configured.stderr


def test_too_late_is_refused_and_twice_is_not():
    late = run(SCAN.format("", "nsde.configure_cpu()"))
    if _with_flags("", _version()):
        assert "RuntimeError: configure_cpu: JAX has already computed" in late.stderr
    else:  # nothing would have been set
        assert late.returncode == 0, late.stderr
    twice = run(SCAN.format("nsde.configure_cpu()", "nsde.configure_cpu()"))
    assert twice.returncode == 0, twice.stderr


def test_nothing_is_done_for_another_platform():
    code = (
        "import os, numpyro_sde as nsde; nsde.configure_cpu(); print(os.environ.get('XLA_FLAGS'))"
    )
    assert run(code, JAX_PLATFORMS="cuda").stdout.strip() == "None"


# Sums that YNNPACK gets wrong under jaxlib 0.10.2: a stack of matrices less its products with a
# stack of vectors, and a sum over many rows.
SUMS = """
import os, numpy as np, jax, jax.numpy as jnp
{}
rng = np.random.default_rng(0)
F, k = rng.normal(size=(1, 10, 10)), rng.normal(size=(1000, 10))
closed_loop = lambda F, k: F - (F * k[:, None, :]).sum(-1)[:, :, None]
found = jax.jit(closed_loop)(F.astype(np.float32), k.astype(np.float32))
print(bool(np.abs(found - closed_loop(F, k)).max() < 1e-4))
x, A = np.zeros((32769, 3), np.float32), jnp.eye(3)
x[:, 0] = np.arange(32769)
found = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((A @ row) ** 2))(x))(x)
print(bool(abs(float(found[-1]) / 32768.0**2 - 1) < 1e-6))
{}
"""


def test_sums_are_right_after_the_import():
    done = run(SUMS.format("import numpyro_sde", ""))
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.skipif(not (0, 10, 2) <= _version() <= (0, 11, 0), reason="jaxlib is not concerned")
def test_late_import_warns_of_wrong_sums():
    done = run(SUMS.format("", "import numpyro_sde"))
    assert "RuntimeWarning: jaxlib" in done.stderr
    assert "import numpyro_sde before" in done.stderr
    told = run(SUMS.format("", "import numpyro_sde"), XLA_FLAGS=WITHOUT_YNN)
    assert told.stdout.split() == ["True", "True"]
    assert "RuntimeWarning" not in told.stderr
