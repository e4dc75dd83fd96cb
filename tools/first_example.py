"""The README's first example, run against an installed package without any extra."""

import pathlib
import re
import sys

import numpyro_sde as nsde

here = pathlib.Path(__file__).parent.parent
if here in pathlib.Path(nsde.__file__).parents and "site-packages" not in nsde.__file__:
    sys.exit(f"the package is not installed: {nsde.__file__}")
for extra in ("arviz", "matplotlib", "pandas"):
    if any(extra == name.partition(".")[0] for name in sys.modules):
        sys.exit(f"importing the package imported {extra}, which is optional")
text = (here / "README.md").read_text(encoding="utf-8")
block = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
if block is None:
    sys.exit("README.md has no example")
# Its last lines need ArviZ, which this environment has not.
source = block[1].split("fit = nsde.diagnostics", 1)[0]
exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})
print(f"numpyro_sde {nsde.__version__}: the first example runs")
