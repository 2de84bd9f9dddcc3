"""Sphinx's settings, and the one rule that turns this project's plain docstrings into reStructuredText."""

import re
from pathlib import Path

project = "fdpass"
author = "The fdpass founders"
project_copyright = "2026, The fdpass founders"
release = version = re.search(r'^version = "(.+)"', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.M)[1]

extensions = ["sphinx.ext.autodoc", "myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "fdpass"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

_ITEM = re.compile(r"(\w+(?:, \w+)*): +(.*)")
_SENTENCE = re.compile(r"(Raises|Returns|Ownership:) ?")


def _plain(text: str) -> str:
    """Escapes what reStructuredText would read as markup: docstrings here have none."""
    return re.sub(r"(\w)_(?!\w)", r"\1\\_", re.sub(r"([\\*`|])", r"\\\1", text))


def _set(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Lines of the form "name: text" become a definition list; the rest stays paragraphs."""
    out: list[str] = []
    in_item = False
    for line in lines:
        text = line.strip()
        item = _ITEM.fullmatch(text) if line[:1] not in ("", " ") else None
        if item and (in_item or not out or not out[-1]) and item[1][0].islower():
            out += ["", f"{_plain(item[1])}", f"    {_plain(item[2])}"]
            in_item = True
        elif in_item and text and not _SENTENCE.match(text):
            out.append(f"    {_plain(text)}")
        else:
            if in_item and text:
                out.append("")
            out.append(_plain(text))
            in_item = False
    lines[:] = [*out, ""]


def setup(app: object) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _set)  # type: ignore[attr-defined]  # a Sphinx, named object so that nothing is imported for it
    return {"parallel_read_safe": True}
