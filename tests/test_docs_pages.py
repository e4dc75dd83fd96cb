"""Every Python block in the README and in docs/ runs, page by page, in one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("", "course", "migrate", "gallery")
PAGES = sorted([ROOT / "README.md", *(p for f in FOLDERS for p in (DOCS / f).glob("*.md"))])
# Pages that fit or compile for more than ten seconds; the README's example stands for them.
SLOW = {
    "check",
    *("4_the_first_posterior", "6_treatments_and_engines", "8_how_do_i_know", "pomp"),
    *("7_several_series", "stan"),
    "inputs_and_doses",
    "learned_drifts",
    "many_series",
    "maximum_likelihood",
    "saving_and_resuming",
    "several_modes",
    "snapshots",
    *(
        "batching",
        "first_model",
        "flows",
        "fractional",
        "integrated_out",
        "kernels",
        "multiscale",
        "particles",
        "path_guides",
    ),
    *(
        *("jump_diffusions", "markov_jump_processes", "reaction_networks"),
        "partly_seen",
        "comparing",
        "comparing_models",
        "forecasting",
        "sde_vs_ode",
        "missing_data",
        "processes",
        "schemes",
        "treatments",
    ),
}
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line number and text of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in _BLOCK.finditer(text)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=_name(page), marks=pytest.mark.slow if page.stem in SLOW else ())
        for page in PAGES
        if blocks(page)
    ],
)
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("arviz")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)  # pages may write files
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, source in blocks(page):
        # Blank lines first, so that a traceback shows the line of the page.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
    pyplot.close("all")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = re.sub(
        r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
