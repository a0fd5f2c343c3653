"""Pieces of HTML that the pages share."""

import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files

from fedgradnorm.errors import RunError

__all__ = ["json_for_html", "key", "plotly_source", "style", "tag", "texts"]


def style() -> str:
    """The pages' style sheet."""
    return files("fedgradnorm.report").joinpath("style.css").read_text(encoding="utf-8")


def plotly_source() -> str:
    """Plotly's JavaScript. Raises RunError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RunError('the report page needs plotly: pip install "fedgradnorm[report]"') from error
    return str(get_plotlyjs())


def json_for_html(value: object) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def tag(name: str, *children: str, **attributes: str) -> str:
    """An element. The children are HTML already; the attributes are escaped here, and ``data_x`` is written ``data-x``."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def texts(name: str, values: Iterable[str], **attributes: str) -> str:
    """An element for each text, which is escaped here."""
    return "".join(tag(name, escape(value), **attributes) for value in values)


def key(text: str, colour: str, kind: str = "") -> str:
    """An entry of a legend."""
    return tag(
        "span",
        "<i></i>",
        tag("span", escape(text)),
        class_=f"key {kind}".strip(),
        style=f"color:{colour}",
    )
