"""The gallery's pages are those of the scripts, and examples are found in two clicks."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "tools"))

import gallery  # noqa: E402

# What a newcomer has, and the example that is nearest to it.
PROBLEMS = {
    "yearly readings of a level that wanders": "gallery/demo.md",
    "an epidemic counted day by day": "gallery/flu_outbreak.md",
    "two species and a forecast": "gallery/hare_lynx.md",
    "patients, doses and concentrations": "gallery/population.md",
    "interest rates seen as they are": "gallery/interest_rates.md",
    "prices with jumps": "gallery/price_jumps.md",
    "a volatility that no one sees": "gallery/leverage.md",
    "spikes of many neurons": "gallery/neurons.md",
    "states that switch": "gallery/ion_channel.md",
    "tracks of single particles": "gallery/particle_tracks.md",
    "a building or a machine driven by inputs": "gallery/building_heat.md",
    "fast variables that no one sees": "gallery/rough_potential.md",
    "molecules of a cell": "gallery/gene_expression.md",
    "populations seen at several times, nobody twice": "gallery/myoblasts.md",
    "two states that something flips between": "gallery/ice_core.md",
    "a film of something that moves": "gallery/moving_spot.md",
    "small scales that a forecast cannot resolve": "gallery/turbulence_closure.md",
}
_LINK = re.compile(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)")


def links(page):
    """Pages that a page links to in its text."""
    text = page.read_text(encoding="utf-8")
    found = [(page.parent / target).resolve() for target in _LINK.findall(text)]
    return {one for one in found if one.is_relative_to(DOCS) and one.exists()}


def test_pages_of_the_gallery_are_those_of_the_scripts():
    wanted = gallery.pages()
    assert set(gallery.PAGES.glob("*.md")) == set(wanted)
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run python tools/gallery.py: {stale}"


def test_the_gallery_is_large_and_shows_pictures_first():
    examples = gallery.all_examples()
    assert len(examples) >= 20
    first = gallery.index(examples).split("## All")[0]
    assert first.count("[![") >= 12
    assert len({one["field"] for one in examples}) >= 8


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_leads_to_its_example_in_two_clicks(problem):
    start = DOCS / "index.md"
    assert problem in start.read_text(encoding="utf-8")
    one = links(start)
    two = set().union(*(links(page) for page in one))
    assert DOCS / PROBLEMS[problem] in one | two


def nav_pages():
    """Pages named in the navigation of mkdocs.yml."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = text[text.index("\nnav:") : text.index("\nnot_in_nav:")]
    return re.findall(r"([\w/]+\.md)$", nav, flags=re.MULTILINE)


def test_the_navigation_names_every_page_once():
    named = nav_pages()
    assert len(named) == len(set(named))
    lost = [page for page in named if not (DOCS / page).exists()]
    assert not lost
    pages = {
        path.relative_to(DOCS).as_posix()
        for path in DOCS.rglob("*.md")
        if path.parent.name != "gallery"
    }
    assert pages <= set(named), pages - set(named)
