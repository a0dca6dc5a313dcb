"""Fill the jinja2 templates in `templates/`: HTML with every value escaped, Markdown, and LaTeX."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

_LATEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "°": r"$^\circ$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def markdown_cell(text: str) -> str:
    """Escape a cell of a Markdown table."""
    return text.replace("|", "\\|")


def markdown_code(text: str) -> str:
    """Format a cell of a Markdown table as code, so that nothing in it is markup."""
    return "`" + markdown_cell(" ".join(text.split())).replace("`", "'") + "`"


ENVIRONMENT = Environment(
    loader=PackageLoader("neco_bench.reports"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.globals["zip"] = zip
ENVIRONMENT.filters |= {"latex": latex, "cell": markdown_cell, "code": markdown_code}
# `tojson` escapes <, >, & and ', so that no text can end a <script>.
ENVIRONMENT.policies["json.dumps_kwargs"] = {
    "ensure_ascii": False,
    "separators": (",", ":"),
    "sort_keys": True,
    "default": str,
}


def render(template: str, **values: Any) -> str:
    """Fill a file of `templates/` with values; in templates named `.html` they are escaped."""
    return ENVIRONMENT.get_template(template).render(**values)
