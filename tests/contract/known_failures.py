"""Cells of the matrix that fail today. A strict xfail: a mend has to take its entry away."""

# A way to say the model, what is wrong, the engines that are wrong.
_TABLE: list[tuple[str, str, list[str]]] = []

KNOWN_FAILURES = {(engine, case): reason for case, reason, engines in _TABLE for engine in engines}
