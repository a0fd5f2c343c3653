"""The pages' templates, which Jinja2 fills in. It escapes every value, and the JSON too."""

from pathlib import Path
from typing import Any

from fedgradnorm.errors import RunError


def write_html(template: str, output: Path, **values: Any) -> Path:
    """Fill in a template and write the page. It is one file, which loads nothing.

    Args:
        template: a file in ``report/templates`` or ``compare/templates``.
        output: the file to write; its folder is made.
        values: the template's values. Plotly's JavaScript is added as ``plotly``.

    Returns:
        The file.

    Raises:
        RunError: plotly or Jinja2 is not installed, or the file cannot be written.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        message = 'the page needs plotly and Jinja2: pip install "fedgradnorm[report]"'
        raise RunError(message) from error
    loader = ChoiceLoader([PackageLoader(f"fedgradnorm.{room}") for room in ("report", "compare")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template(template).render(values, plotly=get_plotlyjs())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"page {output}: cannot be written; {error.strerror}") from error
    return output
