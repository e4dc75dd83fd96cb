"""Reads the CSV files that ship inside the package.

Every file has one header line; the readers ask for columns by name, so that a loader does
not depend on their order.
"""

from importlib import resources

import numpy as np


def read_columns(filename: str, *columns: str) -> tuple[np.ndarray, ...]:
    """Columns of a shipped CSV file, by header name.

    Args:
        filename: Name of a file in ``numpyro_sde/datasets/data``.
        *columns: Header names, in the order wanted.

    Returns:
        One float64 array of shape ``(rows,)`` for each name.

    Raises:
        ValueError: If a column is not in the file's header.
    """
    text = resources.files("numpyro_sde.datasets").joinpath("data", filename).read_text("utf-8")
    lines = text.splitlines()
    header = lines[0].split(",")
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"columns {missing} are not in {filename}, which has {header}")
    table = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:] if line])
    return tuple(table[:, header.index(name)].copy() for name in columns)
