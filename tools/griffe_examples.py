"""Docstrings as the site shows them: `Example:` is a section of examples, roles are code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:\s*$", re.MULTILINE)


class Examples(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Take one object's docstring."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(r"`\1`", obj.docstring.value)
        obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)
