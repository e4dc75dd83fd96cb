"""First examples of README and documentation, by an installed package without extras.

`python tools/first_example.py`, in an environment where the package alone was installed. Both are
taken as they stand, up to where they go on with ArviZ, which this environment has not.
"""

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


def run(page: str, end: str) -> None:
    """Blocks of a page up to `end`, and what they estimate."""
    text, ends, _ = (here / page).read_text(encoding="utf-8").partition(end)
    blocks = re.findall(r"^```python\n(.*?)(?:^```|\Z)", text, re.MULTILINE | re.DOTALL)
    if not (ends and blocks):
        sys.exit(f"{page} has no example that ends before {end!r}")
    namespace: dict = {"__name__": "__main__"}
    for source in blocks:
        exec(compile(source, page, "exec"), namespace)
    draws = namespace["mcmc"].get_samples()
    means = {name: float(draws[name].mean()) for name in ("rate", "mean", "scale", "noise")}
    print(f"{page}:", ", ".join(f"{name} {value:.2f}" for name, value in means.items()))


run("README.md", "fit = nsde.diagnostics")
run("docs/first_model.md", "## 7. ArviZ")
python = ".".join(map(str, sys.version_info[:2]))
print(f"numpyro_sde {nsde.__version__} on Python {python}: the first examples run")
