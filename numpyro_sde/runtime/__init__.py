"""How programs are compiled and run: XLA's options, the compilation cache, time and progress."""

from numpyro_sde.runtime import began

# isort: split
from numpyro_sde.runtime.cache import enable_compilation_cache
from numpyro_sde.runtime.cpu import avoid_wrong_sums, configure_cpu

__all__ = ["avoid_wrong_sums", "began", "configure_cpu", "enable_compilation_cache"]
