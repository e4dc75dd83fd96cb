"""One HTML page of a check: verdicts, tables, pictures, code; nothing outside the file."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

from numpyro_sde.checking.steps import MARKS, Level, Step
from numpyro_sde.diagnostics.compare.plots import load_pyplot

if TYPE_CHECKING:
    from numpyro_sde.checking.report import CheckReport

_CLASSES: dict[Level, str] = {"good": "good", "look": "look", "bad": "bad", "not done": "none"}
_MAX_ROWS = 30
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2330; --soft: #5b6472; --line: #d9dee6;
  --card: #f6f8fa; --good: #17733b; --look: #8a5a00; --bad: #b3261e; --none: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181f; --text: #e6e9ee; --soft: #9aa4b2;
  --line: #313a47; --card: #1d232c; --good: #6fd394; --look: #f0bf5a; --bad: #ff8a80;
  --none: #9aa4b2; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0; }
.verdict { font-size: 1.15rem; border-left: .35rem solid; padding: .4rem .9rem; margin: .8rem 0; }
.good { color: var(--good); } .look { color: var(--look); } .bad { color: var(--bad); }
.none { color: var(--none); }
section { border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0;
  background: var(--card); }
.words { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.badge { float: right; font-weight: 600; border: 1px solid; border-radius: 1rem; padding: 0 .7rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; } .plain td, .plain th { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: .4rem; margin-top: .6rem; }
pre { overflow-x: auto; background: var(--ground); border: 1px solid var(--line); padding: .7rem;
  border-radius: .4rem; font-size: .82rem; } summary { cursor: pointer; color: var(--soft); }
"""


def render(report: CheckReport) -> str:
    """The page of a report.

    Example:
        >>> from numpyro_sde.checking import CheckReport, Step
        >>> page = render(CheckReport("model", {"fit": Step("fit", "good", "use it")}, None))
        >>> page.startswith("<!doctype html>"), "http" in page
        (True, False)
    """
    kind = "bad" if report.failures else "good"
    facts = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in report.about.items()
    )
    body = "".join(_section(step) for step in report.steps.values())
    code = f"<section><h2>To repeat it</h2><pre>{escape(report.code)}</pre></section>"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Check of {escape(report.title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Check of {escape(report.title)}</h1>"
        f"<p class='verdict {kind}'><b>{escape(_capital(report.verdict))}.</b></p>"
        f"{_summary(report)}{body}"
        f"{code if report.code else ''}"
        f"<section><h2>About this run</h2><table class='plain'>{facts}</table></section>"
        "</body></html>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _summary(report: CheckReport) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td class='{_CLASSES[step.level]}'>{MARKS[step.level]}</td>"
        f"<td>{step.seconds:.0f} s</td></tr>"
        for name, step in report.steps.items()
    )
    return f"<table class='plain'>{rows}</table>"


def _section(step: Step) -> str:
    kind = _CLASSES[step.level]
    parts = [
        f"<section><span class='badge {kind}'>{escape(MARKS[step.level])}</span>",
        f"<h2>{escape(_capital(step.name))}</h2>",
        f"<p class='words'>{escape(_capital(step.words))}.</p>",
    ]
    if step.draw is not None and step.level != "not done":
        parts.append(_picture(step.draw, step.name))
    if step.table is not None:
        table = step.table.head(_MAX_ROWS).to_html(
            float_format=lambda v: f"{v:.3g}", border=0, index_names=False
        )
        scrolled = f"<div class='scroll'>{table}</div>"
        parts.append(f"<details open><summary>Numbers</summary>{scrolled}</details>")
    if step.code:
        parts.append(
            f"<details><summary>This step alone</summary><pre>{escape(step.code)}</pre></details>"
        )
    parts.append("</section>")
    return "".join(parts)


def _picture(draw: Any, name: str) -> str:
    """A figure inside the page."""
    pyplot = load_pyplot()
    backend = pyplot.get_backend()
    pyplot.switch_backend("Agg")  # a page needs no window
    try:
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        pyplot.close(figure)
    finally:
        pyplot.switch_backend(backend)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{escape(name)}' src='data:image/png;base64,{data}'>"
