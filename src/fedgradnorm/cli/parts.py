"""The command that lists the parts which a configuration can name."""

from rich.table import Table
from rich.text import Text

import fedgradnorm.cli.terminal as terminal
from fedgradnorm.errors import ConfigError


def list_parts() -> None:
    """List the parts that a configuration can name, with their options and defaults."""
    from fedgradnorm.registry import BUILT_INS, describe

    for kind, names in BUILT_INS.items():
        table = Table(
            "name", "what it is", "options", title=kind, title_justify="left", expand=True
        )
        for name in sorted(names):
            try:
                summary, options = describe(kind, name)
            except ConfigError as error:
                if not isinstance(error.__cause__, ImportError):
                    raise
                table.add_row(name, Text(str(error.__cause__)))  # it says which extra is missing
            else:
                lines = (f"{key} = {value!r}" for key, value in options.items())
                table.add_row(name, summary, "\n".join(lines))
        terminal.console.print(table)
