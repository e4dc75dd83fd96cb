"""The compilation cache: a second process compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import numpyro_sde as nsde

CODE = """
import jax, jax.numpy as jnp, numpyro_sde as nsde
jnp.ones(2) + 1.0  # the cache may be turned on late
nsde.enable_compilation_cache({!r})
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(3)).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"),
      hits.count("/jax/compilation_cache/cache_misses"))
"""


def run(code):
    root = str(Path(nsde.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_second_process_finds_every_program(tmp_path):
    folder = str(tmp_path / "xla")
    hits, misses = run(CODE.format(folder))
    assert hits == 0
    assert misses > 0
    assert run(CODE.format(folder)) == [misses, 0]


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        nsde.enable_compilation_cache(path)
