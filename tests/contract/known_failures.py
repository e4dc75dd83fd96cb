"""Cells of the matrix that fail today. A strict xfail: a mend has to take its entry away."""

KNOWN_FAILURES: dict[tuple[str, str], str] = {}
