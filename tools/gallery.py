"""Pages of the gallery out of the examples' own headers: `python tools/gallery.py`.

The docstring of an example ends in fields, `:title:`, `:problem:`, `:field:`, `:engine:`,
`:data:`, `:tags:`, `:page:`, and perhaps `:picture:` and `:run time:`. `tests/test_gallery.py`
fails where the pages are not those of the scripts.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES, PAGES = ROOT / "examples", ROOT / "docs" / "gallery"
NEEDED = ("title", "problem", "field", "engine", "data", "tags", "page")
_FIELD = re.compile(r"^:([a-z ]+): (.+)$", re.MULTILINE)
_COLUMNS = 3


def read(script: Path) -> dict[str, str]:
    """The fields of an example, with its summary and description.

    Raises:
        ValueError: If a field is missing.
    """
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    found = dict(_FIELD.findall(doc))
    if lost := [name for name in NEEDED if name not in found]:
        raise ValueError(f"{script.name} lacks the fields {lost}")
    text = _FIELD.sub("", doc).strip()
    found["summary"], _, found["text"] = text.partition("\n")
    found["name"] = script.stem
    return found


def all_examples() -> list[dict[str, str]]:
    """Every example, those with a picture first, by field."""
    scripts = sorted(EXAMPLES.glob("*.py"))
    found = [read(one) for one in scripts if ":title:" in one.read_text(encoding="utf-8")]
    return sorted(found, key=lambda one: (picture(one) is None, one["field"], one["name"]))


def picture(example: dict[str, str]) -> str | None:
    """Address of its picture from the gallery's folder, if it has one."""
    name = example.get("picture", f"gallery/{example['name']}.png")
    return f"../images/{name}" if (ROOT / "docs" / "images" / name).exists() else None


def page(example: dict[str, str]) -> str:
    """The page of one example."""
    name, image = example["name"], picture(example)
    rows = {
        "problem": example["problem"],
        "field": example["field"],
        "data": example["data"],
        "engine": example["engine"],
        "run time": example.get("run time", "not measured"),
        "tags": example["tags"],
        "read more": f"[{example['page'].removesuffix('.md')}](../{example['page']})",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    shown = "" if image is None else f"![{example['summary']}]({image})\n\n"
    return (
        f"# {example['title']}\n\n{example['summary']}\n\n{shown}{_prose(example['text'])}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        f"[The script](../../examples/{name}.py), which you run as it stands:\n\n"
        f"    python examples/{name}.py\n"
    )


def _prose(text: str) -> str:
    """A description without its line of usage, brackets and all."""
    return re.sub(r"(Run: )?python examples/.*$", "", text, flags=re.MULTILINE).strip()


def index(examples: list[dict[str, str]]) -> str:
    """The first page: pictures three by three, then a table by field."""
    lines = [
        "# Gallery",
        "",
        "Scripts that run as they are, each with its data, its engine and what it took. "
        f"{len(examples)} of them; the site has each as a notebook too, in `gallery/notebooks/`.",
        "",
    ]
    shown = [one for one in examples if picture(one) is not None]
    for start in range(0, len(shown), _COLUMNS):
        row = shown[start : start + _COLUMNS]
        row += [None] * (_COLUMNS - len(row))  # type: ignore[list-item]
        links = [f"[![{o['title']}]({picture(o)})]({o['name']}.md)" if o else "" for o in row]
        names = [f"[{o['title']}]({o['name']}.md): {o['problem']}" if o else "" for o in row]
        if start == 0:
            lines += [f"| {' | '.join(links)} |", "| --- | --- | --- |"]
        else:
            lines.append(f"| {' | '.join(links)} |")
        lines.append(f"| {' | '.join(names)} |")
    lines += ["", "## All, by field", "", "| field | example | problem | engine | run time |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for one in sorted(examples, key=lambda one: (one["field"], one["title"])):
        lines.append(
            f"| {one['field']} | [{one['title']}]({one['name']}.md) | {one['problem']} | "
            f"{one['engine']} | {one.get('run time', 'not measured')} |"
        )
    tags: dict[str, list[dict[str, str]]] = {}
    for one in examples:
        for tag in one["tags"].split(", "):
            tags.setdefault(tag, []).append(one)
    lines += ["", "## By tag", ""]
    for tag in sorted(tags):
        links = ", ".join(f"[{one['title']}]({one['name']}.md)" for one in tags[tag])
        lines.append(f"- {tag}: {links}")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every page and its text."""
    examples = all_examples()
    found = {PAGES / f"{one['name']}.md": page(one) for one in examples}
    return {PAGES / "index.md": index(examples), **found}


def main() -> None:
    """Write all pages, and remove those whose script is gone."""
    PAGES.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in set(PAGES.glob("*.md")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
