"""How programs are compiled and run: XLA's options, the compilation cache, time and progress."""

from numpyro_sde.runtime import began

# isort: split
from numpyro_sde.runtime.cache import enable_compilation_cache
from numpyro_sde.runtime.cpu import configure_cpu

__all__ = ["began", "configure_cpu", "enable_compilation_cache"]
