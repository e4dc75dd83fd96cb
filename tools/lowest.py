"""The lowest version that pyproject.toml admits of each package needed, as pip's constraints.

`python tools/lowest.py`: one `name==version` a line; fails where a dependency has no lower bound.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str:
    """`name>=bound` as `name==bound`."""
    found = re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} states no lower bound")
    return f"{found[1]}=={found[2]}"


def main() -> None:
    """Print them."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{lowest(one)}\n" for one in project["dependencies"])


if __name__ == "__main__":
    main()
