"""Hooks of `mkdocs build`: mathematics as MathML, links that leave docs/, notebooks of the gallery.

Pages link to examples, benchmarks and the changelog where they stand in the repository, so that
they read well in any viewer of Markdown. In the site these become pages under `source/`.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from gallery import all_examples

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\(\s*)((?:\.\./)+)([^)#\s]+)((?:#[^)\s]*)?\))")
_MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_WIDE = {"index.md", "gallery/index.md"}
_LANGUAGES = {".py": "python", ".stan": "stan", ".sh": "bash", ".toml": "toml", ".json": "json"}


def outside(page: str, link: str) -> str | None:
    """The repository's path of a link that leaves docs/, None for one that does not."""
    target = (ROOT / "docs" / page).parent.joinpath(link).resolve()
    docs = ROOT / "docs"
    if target.is_relative_to(docs) or not target.is_relative_to(ROOT) or not target.is_file():
        return None
    return target.relative_to(ROOT).as_posix()


def _page_of(path: str) -> str:
    if path == "README.md":
        return "index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _text_of(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        # Its own links point into the repository: their text stays.
        return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}````\n"


def on_config(config: Any) -> Any:
    """Put the examples into the navigation: their pages are made of the scripts."""
    pages = [{one["title"]: f"gallery/{one['name']}.md"} for one in all_examples()]
    for entry in config["nav"]:
        if entry.get("Gallery") == "gallery/index.md":
            entry["Gallery"] = ["gallery/index.md", *pages]
            return config
    raise ValueError("mkdocs.yml has no entry `Gallery: gallery/index.md` in its navigation")


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of the repository that a page links to."""
    from mkdocs.structure.files import File

    wanted: set[str] = set()
    for file in files.documentation_pages():
        if file.generated_by:
            continue
        text = Path(file.abs_src_path).read_text(encoding="utf-8")
        for _, ups, rest, _ in _LINK.findall(text):
            path = outside(file.src_uri, ups + rest)
            if path is not None and path != "README.md":
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, _page_of(path), content=_text_of(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that leave docs/ to the pages made of what they point to."""
    here = page.file.src_uri
    if here in _WIDE:
        page.meta["hide"] = ["navigation"]  # room for pictures

    def turn(found: re.Match[str]) -> str:
        path = outside(here, found[2] + found[3])
        if path is None:
            return found[0]
        ups = "../" * here.count("/")
        return f"{found[1]}{ups}{_page_of(path)}{found[4]}"

    folder, _, name = here.removesuffix(".md").partition("/")
    if folder == "gallery" and name != "index":
        # As HTML, since it is written only after the pages.
        markdown += f'\n\n<a href="../notebooks/{name}.ipynb" download>As a notebook</a>\n'
    return _LINK.sub(turn, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Typeset mathematics at build time, so that a page needs no script from elsewhere."""
    from latex2mathml.converter import convert

    def typeset(found: re.Match[str]) -> str:
        latex = html.unescape(re.sub(r"^\\[(\[]|\\[)\]]$", "", found[2].strip()))
        display = "block" if found[1] == "div" else "inline"
        return convert(latex, display=display)

    return _MATH.sub(typeset, content)


def on_post_build(config: Any) -> None:
    """Write a notebook beside each page of the gallery."""
    import jupytext

    target = Path(config["site_dir"]) / "gallery" / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    for script in sorted((ROOT / "examples").glob("*.py")):
        notebook = jupytext.read(script, fmt="py:light")
        jupytext.write(notebook, target / f"{script.stem}.ipynb")
