"""XLA's persistent compilation cache."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from numpyro_sde.runtime.constants import pass_closed_over_arrays


def enable_compilation_cache(path: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs on disk, so that the next process need not compile them.

    Data are arguments of these programs, also where a kernel closes over them: new data of the same
    shape find the programs too. Programs are kept whatever their size, for a posterior is some
    large ones and many small ones. The folder grows; delete it at will, or bound it by
    `jax.config.update("jax_compilation_cache_max_size", num_bytes)`.

    Programs are kept by version of jaxlib, by flags and by machine: a folder that machines share
    is safe, but each fills its own part.

    Args:
        path: the folder, made where missing; None: that of `JAX_COMPILATION_CACHE_DIR` if set,
            else `numpyro_sde/xla` in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`).

    Returns:
        The folder.

    Raises:
        ValueError: the path is a file.
        OSError: the folder cannot be made.

    Example:
        >>> import numpyro_sde as nsde
        >>> turn_on = nsde.enable_compilation_cache  # call it: turn_on("compiled")
    """
    chosen = path or getattr(jax.config, "jax_compilation_cache_dir", None)
    if not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = Path(home) / "numpyro_sde" / "xla"
    folder = Path(chosen).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"enable_compilation_cache: path must be a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX decides at its first compilation whether there is a cache, and where.
    compilation_cache.reset_cache()
    pass_closed_over_arrays()
    return folder
