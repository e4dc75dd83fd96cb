"""When the import of the package began: the first thing that it imports."""

import time

BEGAN = time.perf_counter()
