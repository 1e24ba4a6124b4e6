"""Where tables are printed."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200


def console() -> "Console":
    """As wide as the terminal. Where there is none, in a pipe or a log, wide enough that no value is cut, unless COLUMNS is set."""
    from rich.console import Console  # here: most of what imports this module prints only when asked

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)
